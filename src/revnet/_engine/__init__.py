"""The eager engine: an ordinary forward pass whose saved tensors are recomputed on demand.

A step is `streams[target] = combine(streams[target], fn(*streams[source], **kwargs))`. The forward
pass records the ordinary autograd graph under saved-tensor hooks that keep numbers. The first
number of a step that backward opens makes the engine *walk* from the nearest saved state down to
that step: each step on the way runs `fn` once, and its output undoes the combine; at the step
itself, what `fn` saves is collected for autograd.

    forward.py    Call: runs the steps, records what their replays need
    tape.py       Tape: records, barriers and saved states, shared by both directions
    chain.py      lets a pass go on where the one before it stopped
    hooks.py      PackHook of a call, RecomputeHook of its replay
    backward.py   recover: walks down and replays
    checksums.py  determinism_check="exact"

The rules, cited by number in the code. `docs/how_it_works.md` has an example for each that breaks
without it.

 1. One evaluation of `fn` per step in backward, which serves the inversion and the gradient.
    Otherwise a step would cost two forward passes in backward.
 2. State is found by walking, never by assuming an order; one walk runs at a time. Autograd may
    ask for a few parameters only, or for the first block first.
 3. What was recomputed belongs to the backward call that asked for it. With `retain_graph` a
    second backward recomputes afresh, and two forwards before one backward do not mix.
 4. Recomputed tensors are freed with their hook; a saved state is freed once no pending step needs
    it. What the engine keeps is saved through a no-op Function, so that enclosing hooks (a
    checkpoint, save_on_cpu, another sequence) manage it, too.
 5. Parameters and keyword tensors are not recomputed: they pass through, and their gradients flow
    through the ordinary graph.
 6. A replay sees everything that the call saw (`_state`), and leaves no trace.
 7. A replay that differs from its forward raises, and so does what was changed in place since.
 8. Without gradients there is no engine, only the loop.
 9. The forward calls `block(...)` when it has hooks (FSDP2 gathers there); recomputation calls the
    branches.
10. The combine runs inside the hooks as well: a rule that scales saves tensors for its gradient.
"""

from .._state.call_state import ContextFn as ContextFn
from .chain import rename as rename
from .chain import stands_for_streams as stands_for_streams
from .forward import Call as Call
from .tape import Options as Options
