"""What it costs to pass hidden rows from one process to another.

    python tools/wire_speed.py
    python tools/wire_speed.py --width 7168 --rows 1,512 --seconds 3

Rows go to another process of this machine and back, by pydsa's channel, and where Ray is installed by calls of an actor, and as objects of
its store. Given are the time of one way, of the fastest tenth, and the CPU time of all processes for it: those of Ray itself are counted.
"""
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.stages.channel import Door, connect  # noqa: E402
from pydsa.stages.wire import Close, Limits, Part, Step, decode, encode  # noqa: E402

KEY = bytes(32)     # of two processes that live for seconds, on this machine
STORE = 1 << 28     # bytes of Ray's object store
WARM_UP = 5


def step_of(rows):
    """The step that a stage sends to the next one."""
    n = len(rows)
    return Step(1, 1, "dense", [Part(1, 0, n)], [], np.zeros(n, np.int32), rows)


def limits_of(width):
    """Limits that all frames of this tool keep."""
    return Limits(1 << 14, width, 1 << 18, 1 << 14)


def answer(address, width):
    """The other process: sends each frame back, as a stage does with what it has computed; then its CPU seconds."""
    channel, limits = connect(address, KEY), limits_of(width)
    while (data := channel.receive(limits.most)) is not None:
        frame = decode(data, limits)
        if not isinstance(frame, Step):
            channel.send(repr(time.process_time()).encode())
            continue
        channel.send(*encode(frame))


def timed(there_and_back, seconds, cpu):
    """(seconds of one way, CPU seconds of one way); cpu() -> those of all processes so far."""
    for _ in range(WARM_UP):
        there_and_back()
    times, before, end = [], cpu(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        there_and_back()
        times.append(time.perf_counter() - start)
    fastest = sorted(times)[:max(1, len(times) // 10)]
    return sum(fastest) / len(fastest) / 2, (cpu() - before) / len(times) / 2


def by_channel(rows, seconds):
    """Rows over a channel."""
    opened = []
    door, limits = Door(("127.0.0.1", 0), opened.append), limits_of(rows.shape[1])
    door.open(KEY)
    command = [sys.executable, str(Path(__file__).resolve()), "--answer", f"{door.address[1]}", "--width", str(rows.shape[1])]
    with subprocess.Popen(command) as process:
        while not opened:
            time.sleep(0.01)
        channel = opened[0]

        def there_and_back():
            channel.send(*encode(step_of(rows)))
            frame = decode(channel.receive(limits.most), limits)
            assert frame.rows.shape == rows.shape

        def cpu():
            channel.send(*encode(Close(1, 0)))
            return float(bytes(channel.receive(100))) + time.process_time()
        found = timed(there_and_back, seconds, cpu)
        channel.close()
        process.wait()
    door.close()
    return found


def by_ray(rows, seconds):
    """Rows as arguments and results of an actor's method, and as references of objects -> two results, by name."""
    import psutil
    import ray
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=STORE, log_to_driver=False,
             _node_ip_address="127.0.0.1")
    actor = ray.remote(Echo).remote()
    mine = psutil.Process()
    ray.get(actor.answer.remote(rows[:1]))
    processes = [mine, *mine.children(recursive=True)]

    def cpu():
        return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())
    try:
        return {"Ray, calls of an actor": timed(lambda: ray.get(actor.answer.remote(rows)), seconds, cpu),
                "Ray, objects in its store": timed(lambda: ray.get(ray.get(actor.stored.remote([ray.put(rows)]))), seconds, cpu)}
    finally:
        ray.shutdown()


class Echo:
    """What runs as an actor."""

    def answer(self, rows):
        """Rows as large, which were computed."""
        return np.array(rows)

    def stored(self, objects):
        """A reference of rows that were computed."""
        import ray
        return ray.put(np.array(ray.get(objects[0])))


@click.command(help=__doc__.split("\n")[0])
@click.option("--width", default=7168, show_default=True, help="Values of a row, float32.")
@click.option("--rows", default="1,512", show_default=True, help="Numbers of rows that pass at once.")
@click.option("--seconds", default=3.0, show_default=True, help="Seconds for each.")
@click.option("--answer", "port", type=int, hidden=True)
def main(width, rows, seconds, port):
    if port is not None:
        answer(("127.0.0.1", port), width)
        return
    print("| rows | by | one way, us | CPU of all processes, us |\n|---|---|---|---|")
    for n in map(int, rows.split(",")):
        values = np.random.default_rng(0).standard_normal((n, width)).astype(np.float32)
        found = {"channel": by_channel(values, seconds)}
        try:
            found |= by_ray(values, seconds)
        except ImportError:
            print("Ray is not installed: only the channel is timed.", file=sys.stderr)
        for name, (one_way, cpu) in found.items():
            print(f"| {n} | {name} | {one_way * 1e6:,.0f} | {cpu * 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
