"""A stand-in for a kernel, which shows where it ran."""

from jax_layernorm import _equations

MARK = 1000.0


class MarkingKernel:
    """A stand-in for a kernel: the equations, with outputs moved so that it shows."""

    platforms = ("cpu",)

    def require_support(self, problem):
        if problem.partitioned or problem.exported:
            raise NotImplementedError("it cannot be partitioned or exported")
        if problem.operands[0].shape[-1] != 16:
            raise NotImplementedError("features must be 16")

    def not_default(self, problem):
        rows = problem.operands[0].shape[0]
        return "one row is slower" if rows == 1 else None

    def forward(self, problem):
        assert problem.op == "layer_norm_forward"
        self.require_support(problem)

        def run(*operands, **static):
            out = _equations.forward(*operands, **static)
            return out._replace(y=out.y + MARK)

        return run

    def backward(self, problem):
        assert problem.op == "layer_norm_backward"
        self.require_support(problem)

        def run(*operands, **static):
            out = _equations.backward(*operands, **static)
            return out._replace(dx=out.dx + MARK)

        return run
