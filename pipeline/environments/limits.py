"""Limits of environments' settings."""


def check_whole(**settings: tuple[int, int, int | None]) -> None:
    """Refuse a setting that is no whole number within its limits.

    Args:
        settings: by name, the value with the least and the most that is allowed; None for no most.

    Raises:
        ValueError: the first such setting, by name.
    """
    for name, (value, least, most) in settings.items():
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            allowed = f"from {least} on" if most is None else f"from {least} to {most}"
            raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")
