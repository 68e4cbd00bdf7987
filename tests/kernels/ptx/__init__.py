"""Executes the PTX that Triton emits, on a CPU: a functional interpreter with guarded memory.

``program`` reads the text, ``instructions`` says what each instruction does, ``memory`` guards every access,
``machine`` runs the threads of many programs (CTAs) side by side, and ``launch`` compiles a launch as a GPU would.
``docs/kernels.md`` says what this finds and what it cannot see.
"""
