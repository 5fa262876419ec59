"""WaRA as a method of PEFT: `get_peft_model(model, WaraConfig(r=8, target_modules=["q_proj"]))`.

PEFT has no door for methods of others: a name must be in its `PeftType` enum, whose private tables are
extended here, at run time. So this is written for one minor version of PEFT, refuses any other, and nothing
happens before this module is imported, which also lets PEFT load such an adapter. Our own way,
`factorize_(model, recipes.wara)`, needs none of it.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["WaraConfig", "WaraModel", "as_rankfold", "register"]

NAME = "WARA"
VERSIONS = ((0, 21), (0, 22))  # from the first on, below the second


def register() -> None:
    """Make PEFT know WaRA. A second call does nothing. Raises ImportError where PEFT is missing, of another
    version, or has a WaRA that is not ours; PEFT is then as it was."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("rankfold.peft needs PEFT: pip install 'rankfold[peft]'") from error
    check_version(peft.__version__)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if NAME in peft.PeftType.__members__:
        held: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft.PeftType(NAME))
        if held is None or held.__module__ != "rankfold.peft_tuner":
            raise ImportError(f"PEFT {peft.__version__} has a {NAME} of its own: use that, not rankfold.peft")
        return
    _extend(peft.PeftType)
    try:
        if peft.PeftType(NAME) is not peft.PeftType[NAME] or NAME not in list(peft.PeftType):
            raise ImportError("this Python keeps its enums in another way, and PEFT's cannot be extended")
        from rankfold.peft_tuner import WaraConfig, WaraModel

        register_peft_method(name=NAME.lower(), config_cls=WaraConfig, model_cls=WaraModel)
    except BaseException:
        _withdraw(peft.PeftType)
        raise


def check_version(found: str) -> None:
    """Raise ImportError, with the remedy, for a PEFT that this bridge was not written for."""
    number = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not VERSIONS[0] <= number < VERSIONS[1]:
        low, high = (".".join(map(str, version)) for version in VERSIONS)
        raise ImportError(
            f"rankfold.peft extends private tables of PEFT and knows them from {low} to below {high}; "
            f"installed is {found}. Install 'peft>={low},<{high}', or adapt without PEFT, by "
            "factorize_(model, recipes.wara(rank=8)) and save_as_lora"
        )


def _extend(enum: Any) -> None:
    member = str.__new__(enum, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, NAME, member)
    enum._member_names_.append(NAME)
    enum._member_map_[NAME] = enum._value2member_map_[NAME] = member


def _withdraw(enum: Any) -> None:
    enum._member_names_.remove(NAME)
    del enum._member_map_[NAME], enum._value2member_map_[NAME]
    type.__delattr__(enum, NAME)


register()

from rankfold.peft_tuner import WaraConfig, WaraModel, as_rankfold  # noqa: E402  after the check
