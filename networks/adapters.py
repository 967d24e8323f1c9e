"""Adapters in one form, whichever file they came from: the modules that they are of, and what their file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from networks import AdapterError
from networks.adapter_family import Sign, family_signs, known_family, likely_family
from networks.adapter_module import AdapterModule
from networks.families import Family
from networks.kinds.full import FullModule
from networks.kinds.lora import LoraModule
from networks.names import Target, kohya_name, shapes_of


@dataclass(frozen=True)
class Adapter:
    """An adapter in one form, whichever it came in."""

    modules: Mapping[Target, AdapterModule]
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Keys that are no part of the adapter: AlignHeads in a training state, embeddings bundled with it."""
    frozen: tuple[str, ...] = ()
    """Keys of the weights it was trained on, in a checkpoint of a whole model wrapped by PEFT. They are not read."""
    notes: tuple[str, ...] = ()
    """What a user should know of the file: what was left out, where an alpha came from that it does not say. A phrase each."""

    spelled: tuple[str, ...] = ()
    """Its modules' names as they stand in the file."""
    told: Family | None = None
    """Its family as the user says, or what it was made of."""

    @cached_property
    def family_signs(self) -> list[Sign]:
        return family_signs(shapes_of(self.modules), self.metadata, self.spelled)

    @property
    def known_family(self) -> Family | None:
        """Its family where the file tells; None where nothing does, or signs contradict each other."""
        return self.told or known_family(self.family_signs)

    @property
    def family(self) -> Family:
        """Its family; the likeliest one where that is not known."""
        return self.told or likely_family(self.family_signs)

    def lora_modules(self, what: str) -> dict[Target, LoraModule]:
        """Its modules, all of them LoRA or DoRA. what: that needs such, "resizing". Raises AdapterError for others."""
        found = {target: module for target, module in self.modules.items() if isinstance(module, LoraModule)}
        self._refuse_others(found, what)
        return found

    def summands(self, what: str) -> dict[Target, LoraModule | FullModule]:
        """Its modules, all of them LoRA, DoRA or whole differences, as `lora_modules`."""
        found = {t: module for t, module in self.modules.items() if isinstance(module, (LoraModule, FullModule))}
        self._refuse_others(found, what)
        return found

    def _refuse_others(self, found: Mapping[Target, AdapterModule], what: str) -> None:
        others = sorted({module.kind.title for target, module in self.modules.items() if target not in found})
        if others:
            raise AdapterError(
                f"{len(self.modules) - len(found)} of {len(self.modules)} modules are {' and '.join(others)}, and {what} is "
                "for LoRA. Merge the adapter into a base model instead."
            )

    def names(self) -> dict[Target, str]:
        """Kohya's name of each module, as users know it."""
        return {target: kohya_name(target, self.family) for target in self.modules}
