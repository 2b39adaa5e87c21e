"""The vectors that requests may name, and the ``Steering`` that a request asks for.

A request names a vector, never a path. The vectors are those given at the start and the files in
one folder, which is read again with every request: a new file needs no restart. A request gives its
steering in the field ``steering`` or in the model's name, ``qwen2.5-1.5b@dense=20%``, which every
client can send.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..errors import DenseSteerError, InputError, ModelError
from ..model.marks import marks_of
from ..model.model import Model
from ..steering.places import Positions
from ..steering.request import Amount, MeasuredModel, Request, format_dose, request
from ..steering.steering import LARGE_DOSE, Steering
from ..steering.vector import SteeringVector, VectorMeta, format_layers
from ..text import count, one_line
from .effort import Effort
from .faults import Fault, bad, excerpt
from .schema import ChatRequest, SteeringField
from .settings import Settings

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class NamedVector:
    """A vector that requests may name, and the settings given at the server's start.

    A setting that is ``None`` is the vector's own default (``steering.request.request``).
    """

    vector: SteeringVector
    strength: Amount | None = None
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    @property
    def name(self) -> str:
        return self.vector.name

    def request(
        self,
        strength: str | float | Amount | None = None,
        layers: Iterable[int] | None = None,
        positions: Positions | None = None,
        budget: int | None = None,
    ) -> Request:
        """Fill in what a request leaves out; raises as ``steering.request.request`` does."""
        return request(
            self.vector,
            self.strength if strength is None else strength,
            self.layers if layers is None else layers,
            positions or self.positions,
            budget=budget,
        )


@dataclass(frozen=True)
class Asked:
    """The steering that a request asks for; ``model`` is the model name that asks for it, but its budget, again."""

    steering: Steering
    model: str


class Vectors:
    """Looks vectors up by name, and reads the steering of requests.

    Args:
        given: vectors that stay even if their files change.
        model: the model served; files for models of another size cannot be used.
        settings: the model's name for clients; the folder whose ``NAME.npz`` are vectors too.

    Raises:
        InputError: a given vector's name cannot be part of a model's name, or its default cannot
            be applied.
        VectorMismatchError: a given vector does not fit the model, or was made for another one and
            the settings are strict.
    """

    def __init__(self, given: Sequence[NamedVector], model: Model, settings: Settings):
        self.model, self.base, self._efforts = model, settings.name, settings.efforts
        self._asked_of: MeasuredModel = model  # until the server runs; then what measures nothing
        self._folders = [one for one in (settings.own, settings.folder) if one is not None]
        self._several, self._strict = settings.models is not None, settings.strict
        self._given: dict[str, NamedVector] = {}
        self._files: dict[str, tuple[tuple[int, int], NamedVector | str]] = {}
        for one in given:
            self._check(one)
            self._given[one.name] = one
        self._asked_of = _Known(model)

    def all(self) -> list[NamedVector]:
        """Return every vector that can be used now, those given at the start first."""
        found = [one for one in self._look().values() if isinstance(one, NamedVector)]
        return [*self._given.values(), *found]

    def unusable(self) -> dict[str, str]:
        """Return the folder's files that cannot be used, each with the reason."""
        return {name: one for name, one in self._look().items() if isinstance(one, str)}

    def get(self, name: str, param: str) -> NamedVector:
        """Return the vector of that name; ``param`` is the request's field that names it.

        Raises:
            Fault: no such vector, or one that cannot be used.
        """
        found = self._given.get(name) or self._look().get(name)
        if isinstance(found, NamedVector):
            return found
        if found is not None:
            raise bad(f"vector {excerpt(name)} cannot be used: {found}", param)
        place = self.base if self._several else "this server"
        message = f"no vector {excerpt(name)}: {place} has {self._names()}."
        raise bad(message, param, "vector_not_found")

    def asked(self, model: str | None, field: SteeringField | None) -> Asked | None:
        """Return the steering that a request's model name or its field ``steering`` asks for.

        ``None``: no steering is asked for.

        Raises:
            Fault: steering given twice, an unknown model or vector, or a steering that cannot be
                applied.
        """
        named = self._read_name(model) if model else None
        if named is not None and field is not None:
            raise bad(
                "steering stands in the model's name and in `steering`: expected it once. Send the bare "
                "model name with `steering`.",
                "steering",
            )
        if named is not None:
            one, amount = named
            return self._asked(one, "model", amount)
        if field is None:
            return None
        one = self._choose(field)
        return self._asked(one, "steering", field.strength, field.chosen_layers, field.positions)

    def thinking(
        self, found: Asked | None, asked: ChatRequest
    ) -> tuple[Asked | None, int | None, list[str]]:
        """Apply what a request asks of the thought to the steering that it asks for.

        A level sets strength and budget; where the request itself says how to steer, only the budget. A
        budget without a vector ends the thought by force.

        Args:
            found: the steering so far.
            asked: the request.

        Returns:
            The steering; where the thought is ended by force; the fields that are ignored.

        Raises:
            Fault: the steering cannot be applied.
        """
        level = self._efforts.get(asked.reasoning_effort or "") if self.model.thinks else None
        if level is not None and not self._gates:
            level = replace(level, budget=None)
        one, vectors = None, self.all()
        if found is not None:
            one = self.get(found.steering.vector.name, "steering.vector")
        elif asked.steering is None and "@" not in (asked.model or "") and len(vectors) == 1:
            one = vectors[0]
        ignored = (
            ["reasoning_effort"]
            if asked.reasoning_effort and (level is None or one is None)
            else []
        )
        budget = asked.thinking_budget or (level.budget if level and one else None)
        if not self.model.thinks:
            ignored += ["thinking_budget"] if asked.thinking_budget else []
            budget = None
        if asked.thinking_budget_hard and budget is None:
            ignored.append("thinking_budget_hard")
        hard = asked.thinking_budget_hard or one is None
        if one is None and asked.thinking_budget_hard is False and budget is not None:
            ignored.append("thinking_budget")
            budget = None
        try:
            if budget is not None:
                _ = marks_of(self.model.network).thought  # raises if a budget is impossible
            if found is None and one is not None and level is not None:
                found = self._at_level(one, level)
            if budget is not None and not hard:
                found = self._with_budget(one, found, budget)
        except DenseSteerError as error:
            raise bad(
                str(error), "thinking_budget" if asked.thinking_budget else "reasoning_effort"
            ) from error
        return found, budget if hard else None, ignored

    @cached_property
    def _gates(self) -> bool:
        """Whether the model's marks let a thought be steered."""
        try:
            return bool(marks_of(self.model.network).thought)
        except ModelError:
            return False

    def _at_level(self, one: NamedVector, level: Effort) -> Asked:
        steering = one.request(level.amount).steering(self._asked_of)
        if level.amount is None:
            steering = replace(steering, strength=steering.strength * level.factor)
        return Asked(steering, self.base)

    def _with_budget(self, one: NamedVector, found: Asked | None, budget: int) -> Asked:
        if found is None:
            found = Asked(one.request(0.0).steering(self._asked_of), self.base)
        steering = found.steering
        where = steering.strength, steering.layers, steering.positions
        late = one.request(*where, budget).steering(self._asked_of)
        return Asked(replace(steering, budget=late.budget), found.model)

    def preset(self, one: NamedVector) -> Asked:
        """Return a vector at its default, the dose rounded for display.

        The preset's name asks for exactly this steering.
        """
        usual = one.request().steering(self._asked_of)
        dose = self.model.dose(usual)
        text = format_dose(-dose if usual.strength < 0 else dose)
        return Asked(one.request(text).steering(self._asked_of), f"{self.base}@{one.name}={text}")

    def describe(self, steering: Steering) -> dict[str, object]:
        """Return a steering as JSON, with its dose (0.2 is 20 %) and a warning if that is large."""
        # 12 digits: 0.2 comes back as 0.2, not as 0.19999999999999998
        dose = float(f"{self.model.dose(steering):.12g}")
        warning = None
        if self.model.largest_dose(steering) >= LARGE_DOSE:
            warning = "a large dose: the answer may repeat itself or lose its sense."
        return steering.describe() | {"dose": dose, "warning": warning}

    def listing(self, one: NamedVector) -> dict[str, object]:
        """Return a vector's description; ``unit_dose`` is the dose of strength 1 at each layer.

        ``fingerprint`` identifies its numbers, at all its layers.
        """
        vector, meta = one.vector, one.vector.meta
        sizes, norms = vector.norms(), self.model.norms(vector, vector.layers)
        return {
            "name": one.name,
            "about": _about(meta),
            "fingerprint": Steering(vector, 1.0, vector.layers, "all").fingerprint,
            "layers": list(vector.layers),
            "default": self.describe(one.request().steering(self._asked_of)),
            "unit_dose": {str(layer): sizes[layer] / norms[layer] for layer in vector.layers},
            "recommended": meta.recommended,
            "tested": list(meta.tested),
            "meta": {"model": meta.model, "method": meta.method, "pair_count": meta.pair_count},
        }

    def _asked(
        self,
        one: NamedVector,
        param: str,
        strength: str | float | None,
        layers: Iterable[int] | None = None,
        positions: Positions | None = None,
    ) -> Asked:
        try:
            found = one.request(strength, layers, positions)
            steering = found.steering(self._asked_of)
        except DenseSteerError as error:
            raise bad(str(error), param) from error
        return Asked(steering, self._name_of(one, found))

    def _choose(self, field: SteeringField) -> NamedVector:
        if field.vector is not None:
            return self.get(field.vector, "steering.vector")
        vectors = self.all()
        if len(vectors) != 1:
            place = self.base if self._several else "this server"
            message = f"steering.vector is missing: {place} has {self._names()}."
            raise bad(message, "steering.vector")
        return vectors[0]

    def _read_name(self, text: str) -> tuple[NamedVector, str | None] | None:
        """Read ``BASE``, ``BASE@VECTOR`` or ``BASE@VECTOR=STRENGTH``; ``None`` is the bare name.

        ``STRENGTH`` is as ``Amount.parse`` reads it. Upper and lower case of ``BASE`` are alike.
        """
        split = len(self.base)
        base, at, rest = text[:split], text[split : split + 1], text[split + 1 :]
        if base.casefold() != self.base.casefold() or at not in ("", "@") or (at and not rest):
            message = (
                f"model {excerpt(text)}: this server has {self.base} only, steered as "
                f"{self.base}@VECTOR=20%; see /v1/models."
            )
            raise Fault(404, message, "model", "model_not_found")
        if not at:
            return None
        name, equals, amount = rest.partition("=")
        return self.get(name, "model"), amount if equals else None

    def _name_of(self, one: NamedVector, found: Request) -> str:
        """Return the model name that asks for exactly this, or the bare name if none can.

        A name cannot give other layers or positions than the vector's default.
        """
        usual = one.request(found.amount)
        if (usual.layers, usual.positions) != (found.layers, found.positions):
            return self.base
        name = f"{self.base}@{one.name}"
        if Amount.parse(str(found.amount)) != found.amount and one.request() == found:
            return name  # a default strength of 17 digits, such as a sweep recommends
        return f"{name}={exact(found.amount)}"

    def _names(self) -> str:
        return ", ".join(one.name for one in self.all()) or "none"

    def _look(self) -> dict[str, NamedVector | str]:
        """Return the folders' vectors by name; the reason instead of one that cannot be used."""
        here: dict[str, tuple[tuple[int, int], NamedVector | str]] = {}
        for path in (path for one in self._folders for path in sorted(one.glob("*.npz"))):
            name = path.stem
            if name in self._given or name in here:
                continue
            try:
                state = path.stat()
            except OSError:  # removed meanwhile
                continue
            stamp = (state.st_mtime_ns, state.st_size)
            known = self._files.get(name)
            here[name] = known if known and known[0] == stamp else (stamp, self._load(name, path))
        self._files = here
        return {name: one for name, (_, one) in here.items()}

    def _load(self, name: str, path: Path) -> NamedVector | str:
        try:
            vector = SteeringVector.load(path)
            vector.name = name
            if warning := self._check(NamedVector(vector)):
                log.warning("%s", warning)
        except (DenseSteerError, OSError) as error:
            return str(error).replace(str(path), name)
        # whatever is wrong with one file, the others stay
        except Exception as error:
            log.error("vector %s cannot be read: %s", name, type(error).__name__, exc_info=error)
            return "it cannot be read; the server's log says more."
        return NamedVector(vector)

    def _check(self, one: NamedVector) -> str | None:
        """Raise unless the vector fits the model, can be listed, and its default can be applied.

        Return a warning if it was made for another model.
        """
        if not NAME.fullmatch(one.name):
            raise InputError(
                f"vector name {one.name!r}: expected letters, digits and . _ + - only, so that a "
                "model name can hold it. Rename the file."
            )
        size = {"hidden_size": self.model.hidden_size, "layer_count": self.model.layer_count}
        one.vector.check_fits(**size, model="the model")  # clients must not see the model's path
        self.preset(one)
        if self.model.thinks and self._gates:
            for level in self._efforts.values():
                found = self._at_level(one, level)
                if level.budget is not None:
                    self._with_budget(one, found, level.budget)
        json.dumps(self.listing(one), allow_nan=False)
        return self.model.other_weights(one.vector, strict=self._strict)


class _Known:
    """A running server's model: it gives what is known, and refuses what takes a forward pass.

    Requests are read on the loop's thread, which must not run the model, nor wait while others' answers run.
    """

    def __init__(self, model: Model):
        self._model = model

    def norms(self, vector: SteeringVector, layers: Iterable[int]) -> Mapping[int, float]:
        return self._model.norms(vector, layers)

    def other_weights(self, vector: SteeringVector, *, strict: bool = False) -> str | None:
        return self._model.other_weights(vector, strict=strict)

    def kl_strength(
        self, vector: SteeringVector, layers: Sequence[int], positions: Positions, kl: float
    ) -> float:
        found = self._model.known_kl_strength(vector, layers, positions, kl)
        if found is None:
            where = "" if positions == "all" else f", positions {positions}"
            raise InputError(
                f"the strength for a KL of {kl:g} nats is not known for {vector.name} at layer "
                f"{format_layers(layers)}{where}, and a running server measures none: expected a "
                "strength, a dose such as 20%, or a KL between those that `densesteer calibrate --write` "
                "stored, or that the server was started with (--kl)."
            )
        return found


def _about(meta: VectorMeta) -> str:
    """Return one sentence on a vector: how it was made, of what, and for which model."""
    method = one_line((meta.method or "").partition(":")[0]) or "method not recorded"
    pairs = f" of {count(meta.pair_count, 'pair')}" if meta.pair_count else ""
    swept = (meta.recommended or {}).get("reason") not in (None, "trained")
    found = ", setting recommended by a sweep" if swept else ""
    return f"{method[0].upper()}{method[1:]}{pairs}, made for {one_line(meta.model)}{found}."


def exact(amount: Amount) -> str:
    """Write an amount so that ``Amount.parse`` reads the same again, as short as that allows."""
    short = str(amount)
    if Amount.parse(short) == amount:
        return short
    if amount.unit == "dose":
        return f"{100 * amount.number:.15g}%"
    return f"{amount.number!r}{'nats' if amount.unit == 'kl' else ''}"
