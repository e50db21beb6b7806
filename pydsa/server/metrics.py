"""What Prometheus reads at /metrics."""
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PER_TOKEN = (.001, .0025, .005, .01, .02, .03, .05, .075, .1, .15, .25, .5, 1, 2.5)

# Numbers of the engine's Stats: counters and gauges, with what they are.
COUNTERS = {"prompt_tokens": ("n_prompt", "Tokens of prompts that were run."),
            "prompt_tokens_reused": ("n_reused", "Tokens of prompts that were in a cache."),
            "prompt_seconds": ("prompt_seconds", "Seconds that prompts took."),
            "tokens_predicted": ("n_generated", "Tokens that were generated."),
            "tokens_predicted_seconds": ("generation_seconds", "Seconds that steps of generation took."),
            "decode_steps": ("n_steps", "Steps of generation, each for one token of several answers."),
            "answers_finished": ("n_finished", "Answers that are complete."),
            "answers_failed": ("n_failed", "Answers that ended with an error."),
            "answers_cancelled": ("n_cancelled", "Answers whose client went away.")}
GAUGES = {"requests_deferred": ("n_waiting", "Requests that wait for a slot."),
          "cache_bytes": ("cache_bytes", "Bytes of conversations in memory, beside the slots."),
          "cache_file_bytes": ("cache_file_bytes", "Bytes of conversations in files.")}


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, service):
        self._service, self._registry = service, CollectorRegistry()
        self._registry.register(self)

        def histogram(name, text, buckets):
            return Histogram(f"pydsa:{name}", text, buckets=buckets, registry=self._registry)
        self._requests = Counter("pydsa:http_requests", "Requests by method, path and status.", ("method", "path", "status"),
                                 registry=self._registry)
        self._seconds = histogram("http_request_seconds", "Seconds from a request to the end of its response.", SECONDS)
        self._queued = histogram("queue_seconds", "Seconds that a request waited for a slot.", SECONDS)
        self._first = histogram("time_to_first_token_seconds", "Seconds from a request to its first token.", SECONDS)
        self._token = histogram("time_per_token_seconds", "Seconds between two tokens of an answer.", PER_TOKEN)

    def collect(self):
        """The engine's numbers, as prometheus-client asks for them."""
        engine = self._service.engine
        yield GaugeMetricFamily("pydsa:ready", "Whether the model is loaded.", float(engine is not None))
        if engine is not None:
            yield GaugeMetricFamily("pydsa:slots", "Answers that can run at the same time.", engine.n_parallel)
            n_busy = sum(slot.state != "idle" for slot in engine.slots())
            yield GaugeMetricFamily("pydsa:requests_processing", "Slots that run a request.", n_busy)
            for name, (field, text) in COUNTERS.items():
                yield CounterMetricFamily(f"pydsa:{name}", text, getattr(engine.stats, field))
            for name, (field, text) in GAUGES.items():
                yield GaugeMetricFamily(f"pydsa:{name}", text, getattr(engine.stats, field))

    def note(self, timings):
        """Count a finished answer, by its requests.Timings."""
        self._queued.observe(timings.queued)
        self._first.observe(timings.queued + timings.prompt)
        if timings.n_generated > 1:
            self._token.observe(timings.generation / (timings.n_generated - 1))

    def note_request(self, method, path, status, seconds):
        """Count a response; path: that of a route, as others would fill the memory."""
        self._requests.labels(method, path, status).inc()
        self._seconds.observe(seconds)

    def text(self):
        """The page -> (its bytes, its content type)."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
