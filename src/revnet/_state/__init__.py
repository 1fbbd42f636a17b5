"""What a replay must see again, one file for each kind of state (rule 6 of the engine).

`call_state` composes the kinds. Each follows one protocol: record before the call, settle after it,
check and restore before a replay, verify after it.

    contents     what containers, functions and plain objects hold
    objects      these as they were, to any depth and with one memo
    copies       what a replay reads in their place
    wholes       generators and arrays, which are put back as a whole
    tensors      tensors without gradient, copied only where somebody writes to them
    branch       the modules of a step: the one visitor
    structure    what of them is compared all at once
    modules      attributes, buffers, parameters and keywords of a step
    fsdp         what FSDP2 exchanges between call and replay
    random       generators
    environment  autocast, TF32, kernels of attention, default dtype: settings of the process
    decisions    what `revnet.remember` was given
    outputs      what modules under `revnet.remember_outputs` decided and returned
    results      results of single operations
    undo         takes back what a replay changed
"""
