"""A Ray cluster of two nodes on this machine, for tests: a program that says where it is, and lets one node leave.

It writes "ADDRESS" to stdout, ends the second node when it reads a line, and all at the end of stdin. The environment says how it listens.
"""
import os
import sys
import tempfile

from ray.cluster_utils import Cluster

from pydsa.stages.local_ray import OBJECT_STORE


def main():
    """Run the cluster."""
    options = dict(num_cpus=1, num_gpus=0, object_store_memory=OBJECT_STORE)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)       # what Ray writes is no answer
    with tempfile.TemporaryDirectory(prefix="pydsa-ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder       # where the address of the last cluster is noted, in a folder that must be there
        os.mkdir(os.path.join(folder, "ray"))
        cluster = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False, "temp_dir": folder})
        second = cluster.add_node(**options)
        print(cluster.address, file=answers, flush=True)
        if sys.stdin.readline():
            cluster.remove_node(second, allow_graceful=False)
            print("removed", file=answers, flush=True)
            sys.stdin.read()
        cluster.shutdown()


if __name__ == "__main__":
    main()
