"""Compare the Triton kernels with the plain ones on a CPU. Run as a program with TRITON_INTERPRET=1."""

import torch

from megatron_cca.parallel import sequence_logps, tiles, triton_tiles


def compare_tiles(rows, widths):
    """Running statistics over several tiles, targets on their borders, and the last tile's gradient."""
    total = sum(widths)
    targets = torch.linspace(0, total - 1, rows).long()
    targets[1], targets[2] = widths[0] - 1, widths[0]
    both = [(torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows)) for _ in range(2)]
    first = 0
    for width in widths:
        logits = 30 * torch.randn(rows, width)
        tiles.absorb(logits.clone(), targets - first, *both[0])
        triton_tiles.absorb(logits, targets - first, *both[1])
        first += width
    for plain, fused in zip(*both, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    upstream = torch.randn(rows)
    local = targets - (total - widths[-1])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        plain, fused = (
            module.logits_gradient(logits.clone(), local, *both[0][:2], upstream, dtype)
            for module in (tiles, triton_tiles)
        )
        assert fused.dtype == dtype
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=1e-8)


def compare_whole_function():
    """The public function with either set of kernels."""
    hidden, weight = torch.randn(5, 2, 8), torch.randn(5000, 8)
    targets, mask = torch.randint(0, 4999, (2, 5)), torch.rand(2, 5) < 0.8
    answers = []
    for module in (tiles, triton_tiles):
        original = tiles.operations_for
        tiles.operations_for = lambda device, module=module: module
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logps = sequence_logps(*leaves, targets, mask, vocab_size=4999, chunk_size=3)
        logps.sum().backward()
        tiles.operations_for = original
        answers.append([logps.detach(), *(leaf.grad for leaf in leaves)])
    for plain, fused in zip(*answers, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    torch.manual_seed(0)
    compare_tiles(rows=4, widths=[2048, 3000, 7])
    compare_tiles(rows=3, widths=[5, 1])
    compare_whole_function()
    print("fused and plain agree")
