// The kernels for few tokens on the host, for tests/backends/native/test_few_tokens.py: the same source.
#include "few_tokens.h"

#include LORA_FORWARD_SOURCE
#include LORA_GRADS_SOURCE

using namespace lora_kernels::few;

namespace {

template <class C>
int run(Params p, int shared_bytes, bool downwards) {
    if (shared_bytes != C::SHARED) return -1;
    return run_grid(p.hc + p.ctas * p.ks, C::THREADS, C::SHARED, p.ks, downwards, [&] { forward<C>(p); });
}

template <int MT, int NW, int D8, int D16, int LOAD>
int with_tokens(const Params& p, int shared_bytes, bool downwards) {
    const bool ragged = p.N % (16 * MT);
    if (p.M > 8) {
        return ragged ? run<Config<MT, 2, NW, D16, LOAD, true>>(p, shared_bytes, downwards)
                      : run<Config<MT, 2, NW, D16, LOAD, false>>(p, shared_bytes, downwards);
    }
    return ragged ? run<Config<MT, 1, NW, D8, LOAD, true>>(p, shared_bytes, downwards)
                  : run<Config<MT, 1, NW, D8, LOAD, false>>(p, shared_bytes, downwards);
}

}  // namespace

extern "C" {

int lora_few_forward(int instance, const Params* p, char* workspace, int shared_bytes, bool downwards) {
    Params q = *p;
    q.part = reinterpret_cast<float*>(workspace + PART_OFFSET);
    q.flag = reinterpret_cast<unsigned*>(workspace + FLAG_OFFSET);
    q.count = reinterpret_cast<unsigned long long*>(workspace);
    if (instance == 0) return with_tokens<1, 16, 3, 2, REGISTERS>(q, shared_bytes, downwards);
    if (instance == 1) return with_tokens<1, 8, 2, 2, REGISTERS>(q, shared_bytes, downwards);
    return with_tokens<2, 8, 2, 2, COPIES>(q, shared_bytes, downwards);
}

int lora_few_first_grads(const GradParams* p, int grid, int shared_bytes, bool downwards) {
    return p->M > 8 ? run_grid(grid, GRAD_THREADS, shared_bytes, 1, downwards, [&] { first_grads<2>(*p); })
                    : run_grid(grid, GRAD_THREADS, shared_bytes, 1, downwards, [&] { first_grads<1>(*p); });
}

int lora_few_last_grads(const LastParams* p, int grid, int shared_bytes, bool downwards) {
    return run_grid(grid, GRAD_THREADS, shared_bytes, 1, downwards, [&] { last_grads(*p); });
}
}
