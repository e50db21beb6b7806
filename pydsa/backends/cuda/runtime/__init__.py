"""The GPU as the host sees it: arrays, launches, copies, the driver."""
