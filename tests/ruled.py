"""The rule of a test by its name and settings, as the argument of ``select``."""

from weightlora.selection.rules import rule_of, settings_of

SETTINGS = ("head_steps", "threshold_every", "gate_lr", "order")


def ruled(rule="first_order", **options):
    """``options`` with the settings that the rule has in a rule object: ``ruled(head_steps=0, steps=4)``."""
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    known = settings_of(rule_of(rule))
    return {**options, "rule": rule_of(rule, **{k: v for k, v in settings.items() if k in known})}
