from run.flags import PRESETS, check, parse_settings  # noqa: F401 (import these from run.flags)
