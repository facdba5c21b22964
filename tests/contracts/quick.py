"""Registered attacks with short searches, for the tests of promises."""

import dataclasses

from corruptions.adversarial.ensembles import Ensemble
from robustlab.core.errors import ConfigError
from robustlab.core.registry import ATTACKS

SHORT = {"steps": 5, "queries": 60, "draws": 1}


def quick(name, **fields):
    """Return an attack with few steps."""
    kind = ATTACKS.get(name)
    have = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in SHORT.items() if key in have} | fields)


def for_three_classes(norm=None):
    """Return the names of attacks on the answers of models with three classes, of a norm if one is given."""
    return [name for name in ATTACKS.names() if _applies(ATTACKS.get(name), norm)]


def _applies(kind, norm):
    if kind.goal != "answer" or (norm is not None and norm not in kind.norms):
        return False
    if not issubclass(kind, Ensemble):
        return True
    try:
        return bool(kind().attacks(3, "multiclass"))
    except ConfigError:
        return False
