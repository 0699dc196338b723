// Collectives of a process group, whatever its backend (c10d::Backend).

#include "dist.h"

#include <torch/csrc/distributed/c10d/Types.hpp>

#include <chrono>

using sail::guarded_remote;

namespace {

template <typename F>
sail_error* started(sail_work** out, F&& start) {
  return guarded_remote([&] { *out = new sail_work{start()}; });
}

}  // namespace

extern "C" {

void sail_group_free(sail_group* group) { delete group; }

// Waits for all collectives, then leaves the group; every rank makes the same call.
sail_error* sail_group_shut_down(sail_group* group) {
  return guarded_remote([&] { group->backend->shutdown(); });
}

sail_error* sail_group_set_timeout(sail_group* group, int64_t timeout_ms) {
  return guarded_remote([&] { group->backend->setTimeout(std::chrono::milliseconds(timeout_ms)); });
}

// `op` is a c10d::ReduceOp::RedOpType.
sail_error* sail_all_reduce(sail_group* group, const at::Tensor* tensor, uint8_t op, sail_work** out) {
  return started(out, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    return group->backend->allreduce(tensors, options);
  });
}

sail_error* sail_broadcast(sail_group* group, const at::Tensor* tensor, int64_t root, sail_work** out) {
  return started(out, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.rootTensor = 0;
    return group->backend->broadcast(tensors, options);
  });
}

sail_error* sail_reduce_scatter(sail_group* group, const at::Tensor* output, const at::Tensor* input,
                                sail_work** out) {
  return started(out, [&] {
    at::Tensor to = *output, from = *input;
    return group->backend->_reduce_scatter_base(to, from, c10d::ReduceScatterOptions());
  });
}

sail_error* sail_all_to_all(sail_group* group, const at::Tensor* output, const at::Tensor* input,
                            sail_work** out) {
  return started(out, [&] {
    at::Tensor to = *output, from = *input;
    std::vector<int64_t> equal;
    return group->backend->alltoall_base(to, from, equal, equal, c10d::AllToAllOptions());
  });
}

sail_error* sail_all_gather(sail_group* group, const at::Tensor* output, const at::Tensor* input,
                            sail_work** out) {
  return started(out, [&] {
    at::Tensor to = *output, from = *input;
    return group->backend->_allgather_base(to, from, c10d::AllgatherOptions());
  });
}

sail_error* sail_barrier(sail_group* group, sail_work** out) {
  return started(out, [&] { return group->backend->barrier(c10d::BarrierOptions()); });
}

// Gloo: blocks until the collective has ended. NCCL: makes the current stream wait for it.
sail_error* sail_work_wait(sail_work* work) {
  return guarded_remote([&] { work->work->wait(); });
}

void sail_work_free(sail_work* work) { delete work; }

}  // extern "C"
