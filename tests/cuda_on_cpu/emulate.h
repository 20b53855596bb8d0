// CUDA on the CPU, as far as csrc/cuda uses it: a kernel's blocks run one after another, in a shuffled order, and the
// threads of a block as fibres of one thread, which change places at barriers, shuffles and votes alone. That shows
// what a kernel computes and where it would hang, not how fast it is. Found besides: a lane that a shuffle names but
// that does not come, threads that leave before a barrier, and, by the shuffled order, who relies on coming first.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// ---- the language ----
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another, and find what the one before has left

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

// ---- fibres ----
namespace emulate {

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;
struct Warp {  // of a collective operation: what lanes gave, who has come, and who may read what was given
    uint64_t given[WARP];
    unsigned arrived = 0, reading = 0;
};

struct Fibre {
    ucontext_t first;
    jmp_buf state;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool started = false, done = false;
};

struct Machine {
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::vector<Warp> warps;
    std::function<void()> kernel;
    jmp_buf scheduler;
    std::exception_ptr failure;
    unsigned current = 0, threads = 0, order = 1;
    uint64_t progress = 0;  // grows whenever a thread arrives somewhere or ends
    unsigned arrived = 0, rounds = 0, held = 0, held_before = 0;  // at the barrier, and with a predicate that held

    unsigned shuffled() { return order = order * 1664525u + 1013904223u; }
};

inline Machine machine;

inline void yield() {
    Fibre& fibre = *machine.fibres[machine.current];
    if (_setjmp(fibre.state) == 0) _longjmp(machine.scheduler, 1);
}

// A fibre runs its thread of one kernel after another.
inline void run_fibre() {
    while (true) {
        try {
            machine.kernel();
        } catch (...) {
            machine.failure = std::current_exception();
        }
        machine.fibres[machine.current]->done = true;
        ++machine.progress;
        yield();
    }
}

// The machine's current fibre runs until it yields or ends.
inline void resume() {
    Fibre& fibre = *machine.fibres[machine.current];
    threadIdx = dim3(machine.current);
    if (_setjmp(machine.scheduler) != 0) return;
    if (fibre.started) _longjmp(fibre.state, 1);
    fibre.started = true;
    getcontext(&fibre.first);
    fibre.first.uc_stack.ss_sp = fibre.stack.get();
    fibre.first.uc_stack.ss_size = STACK;
    makecontext(&fibre.first, run_fibre, 0);
    setcontext(&fibre.first);
}

// Each thread of a warp in turn, until all wait or have ended. Returns how many have not.
inline unsigned run_warp(unsigned warp) {
    const unsigned first = machine.shuffled() >> 8, step = machine.shuffled() >> 8 | 1;
    unsigned left = 0;
    for (unsigned i = 0; i < WARP; ++i) {
        machine.current = warp * WARP + (first + i * step) % WARP;  // each once, because step is odd
        if (machine.fibres[machine.current]->done) continue;
        resume();
        left += !machine.fibres[machine.current]->done;
    }
    return left;
}

// Warps run by priority: as far as one can go without those below it, it goes. Nothing shows a missing barrier better.
inline void run_block() {
    for (unsigned t = 0; t < machine.threads; ++t) machine.fibres[t]->done = false;
    const unsigned warps = machine.threads / WARP;
    machine.warps.assign(warps, Warp());
    machine.arrived = machine.held = 0;
    std::vector<unsigned> left(warps, WARP);
    const unsigned first = machine.shuffled() >> 8, step = machine.shuffled() >> 8 | 1;
    for (unsigned i = 0; i < warps && !machine.failure;) {
        const unsigned warp = (first + i * step) % warps;
        const uint64_t before = machine.progress;
        if (left[warp] > 0) left[warp] = run_warp(warp);
        i = machine.progress == before ? i + 1 : 0;
    }
    const unsigned waiting = std::accumulate(left.begin(), left.end(), 0u);
    if (waiting > 0 && !machine.failure) {
        const std::string said = "emulated kernel: " + std::to_string(waiting) + " threads wait for others for ever";
        machine.failure = std::make_exception_ptr(std::runtime_error(said));
    }
    if (machine.failure) {
        machine.fibres.clear();  // they are in the middle of something
        std::rethrow_exception(std::exchange(machine.failure, nullptr));
    }
}

inline void run(dim3 grid, dim3 block, std::function<void()> kernel) {
    if (block.x % WARP != 0 || (block.x & (block.x - 1)) != 0 || block.y != 1 || grid.z != 1 || grid.x == 0) {
        throw std::runtime_error("emulated kernel: a grid or block that is not expected");
    }
    machine.kernel = std::move(kernel), machine.threads = block.x;
    while (machine.fibres.size() < block.x) machine.fibres.push_back(std::make_unique<Fibre>());
    blockDim = block, gridDim = grid;
    const unsigned first = machine.shuffled() >> 8;
    const bool backwards = machine.shuffled() >> 16 & 1;
    for (unsigned i = 0; i < grid.x; ++i) {
        const unsigned x = (first + i) % grid.x;
        for (unsigned y = 0; y < grid.y; ++y) {
            blockIdx = dim3(backwards ? grid.x - 1 - x : x, y);
            run_block();
        }
    }
}

// All threads of the block, which learn for how many of them the predicate held.
inline unsigned barrier(bool predicate) {
    const unsigned round = machine.rounds;
    ++machine.progress;
    machine.held += predicate;
    if (++machine.arrived == machine.threads) {
        machine.held_before = machine.held, machine.held = machine.arrived = 0;
        ++machine.rounds;
    }
    while (machine.rounds == round) yield();
    return machine.held_before;
}

// The lanes of the mask give a value each, and each reads from what all gave.
template <typename T, typename Read>
auto collective(unsigned mask, T value, const Read& read) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a lane gives eight bytes at most");
    Warp& warp = machine.warps[machine.current / WARP];
    const unsigned lane = machine.current % WARP, bit = 1u << lane;
    if (!(mask & bit)) throw std::runtime_error("emulated kernel: a lane is not in its own mask");
    while (warp.reading & mask) yield();
    ++machine.progress;
    std::memcpy(&warp.given[lane], &value, sizeof(T));
    warp.arrived |= bit;
    if ((warp.arrived & mask) == mask) warp.arrived &= ~mask, warp.reading |= mask;
    while (!(warp.reading & bit)) yield();
    const auto get = [&](unsigned from) {
        if (!(mask >> from & 1)) throw std::runtime_error("emulated kernel: a lane reads from one not in the mask");
        T given;
        std::memcpy(&given, &warp.given[from], sizeof(T));
        return given;
    };
    const auto result = read(lane, get);
    warp.reading &= ~bit;
    ++machine.progress;
    return result;
}

template <typename T, typename Of>
unsigned ballot(unsigned mask, T value, const Of& of) {
    return collective(mask, value, [&](unsigned lane, const auto& get) {
        unsigned bits = 0;
        for (unsigned from = 0; from < WARP; ++from) {
            if (mask >> from & 1 && of(get(from), get(lane))) bits |= 1u << from;
        }
        return bits;
    });
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned width, const std::function<int(int)>& source) {
    return collective(mask, value, [&](unsigned lane, const auto& get) {
        const int begin = lane / width * width, from = source(lane);
        return get(from >= begin && from < begin + static_cast<int>(width) ? from : lane);
    });
}

}  // namespace emulate

// ---- what threads do together ----
inline void __threadfence() {}
inline void __syncthreads() { emulate::barrier(false); }
inline int __syncthreads_or(int predicate) { return emulate::barrier(predicate) > 0; }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulate::ballot(mask, predicate, [](int theirs, int) { return theirs != 0; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
    return emulate::ballot(mask, value, [](T theirs, T mine) { return theirs == mine; });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = emulate::WARP) {
    return emulate::shuffle(mask, value, width, [=](int lane) { return lane / width * width + from % width; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = emulate::WARP) {
    return emulate::shuffle(mask, value, width, [=](int lane) { return lane - static_cast<int>(by); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = emulate::WARP) {
    return emulate::shuffle(mask, value, width, [=](int lane) { return lane + static_cast<int>(by); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = emulate::WARP) {
    return emulate::shuffle(mask, value, width, [=](int lane) { return lane ^ by; });
}

template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
    const T before = *at;
    *at = before + value;
    return before;
}
template <typename T>
T atomicOr(T* at, std::common_type_t<T> value) {
    const T before = *at;
    *at = before | value;
    return before;
}
template <typename T>
T atomicExch(T* at, std::common_type_t<T> value) {
    const T before = *at;
    *at = value;
    return before;
}

// ---- the runtime ----
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    if (pitch < width) return cudaErrorInvalidValue;
    for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(to) + row * pitch, value, width);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return cudaMemset2DAsync(to, bytes, value, bytes, 1, stream);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    if (config->gridDim.y > 65535) return cudaErrorInvalidValue;
    emulate::run(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
    return cudaSuccess;
}
