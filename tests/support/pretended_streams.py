"""Streams and events of a pretended GPU: see pretended_gpu.py."""


class Stream:
    """All streams run at once, so nothing is ever waited for; two streams of a device are different ones."""

    def __init__(self, gpu, device):
        self.gpu, self.device = gpu, device

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or Event(self.gpu)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.wait("synchronize() of a stream")


class Event:
    """An event that has always come."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 1.0

    def synchronize(self) -> None:
        self.gpu.wait("synchronize() of an event")
