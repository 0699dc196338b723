// The key-value store through which processes find each other (c10d::TCPStore).

#include "dist.h"

#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>

using sail::guarded_remote;

namespace {

// c10d logs every attempt to connect and the stack of every fault beside throwing it; the caller reports what
// was thrown. TORCH_CPP_LOG_LEVEL brings the log back.
void quieten_once() {
  static const bool done = [] {
    if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) FLAGS_caffe2_log_level = c10::GLOG_FATAL;
    return true;
  }();
  (void)done;
}

std::vector<uint8_t> bytes(const uint8_t* data, size_t len) { return {data, data + len}; }

// `data` and `len` receive a buffer that the caller frees with `sail_bytes_free`.
void give(const std::vector<uint8_t>& value, uint8_t** data, size_t* len) {
  *data = static_cast<uint8_t*>(std::malloc(value.empty() ? 1 : value.size()));
  if (*data == nullptr) std::abort();
  if (!value.empty()) std::memcpy(*data, value.data(), value.size());
  *len = value.size();
}

}  // namespace

extern "C" {

void sail_bytes_free(uint8_t* data) { std::free(data); }

sail_error* sail_store_new(const char* host, uint16_t port, bool serve, const char* prefix,
                           int64_t timeout_ms, sail_store** out, uint16_t* found_port) {
  return guarded_remote([&] {
    quieten_once();
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serve;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    *found_port = tcp->getPort();
    c10::intrusive_ptr<c10d::Store> store = tcp;
    if (*prefix != '\0') store = c10::make_intrusive<c10d::PrefixStore>(prefix, store);
    *out = new sail_store{std::move(store)};
  });
}

void sail_store_free(sail_store* store) { delete store; }

sail_error* sail_store_set(sail_store* store, const char* key, const uint8_t* data, size_t len) {
  return guarded_remote([&] { store->store->set(key, bytes(data, len)); });
}

// Waits until the key is there, at most the store's timeout.
sail_error* sail_store_get(sail_store* store, const char* key, uint8_t** data, size_t* len) {
  return guarded_remote([&] { give(store->store->get(key), data, len); });
}

sail_error* sail_store_check(sail_store* store, const char* key, bool* there) {
  return guarded_remote([&] { *there = store->store->check({key}); });
}

sail_error* sail_store_add(sail_store* store, const char* key, int64_t amount, int64_t* sum) {
  return guarded_remote([&] { *sum = store->store->add(key, amount); });
}

sail_error* sail_store_wait(sail_store* store, const char* key, int64_t timeout_ms) {
  return guarded_remote([&] { store->store->wait({key}, std::chrono::milliseconds(timeout_ms)); });
}

}  // extern "C"
