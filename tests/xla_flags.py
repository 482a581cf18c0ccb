"""How tests compile, in this process and in those that they start; imports nothing, since it comes before jax."""


def xla_flags(devices: int) -> str:
    """For so many simulated devices.

    Compiling is most of what tests wait for, and their shapes are tiny: machine code as it comes takes a quarter less.
    Threads of eight devices on two busy cores may wait for one another longer than the 40 s after which XLA aborts.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
