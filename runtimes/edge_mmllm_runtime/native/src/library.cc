// The onnxruntime custom op `edge_mmllm.Program`: a whole forward pass in one node.
//
// Inputs: token ids int64 (seq,) or embeddings float32 (seq, hidden); position int64 (1,) where the
// program has one; logit_rows int64 (rows,); the states; the weights, which must be constant.
// Outputs: logits float32 (rows, vocab), then each state's next value (may be the same memory).
#include <sched.h>

#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>

#include "ort_abi.h"
#include "program.h"

namespace edge {

namespace {

constexpr int kFloat = 1, kInt64 = 7, kVariadic = 2;
constexpr int kInvalidArgument = 2, kFail = 1;

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : int(count);
}

void check(const ort::Api& api, ort::Status* status) {
  if (status == nullptr) return;
  const std::string message = api.error_message(status);
  api.release_status(status);
  throw Error(message);
}

Tensor describe(const ort::Api& api, const ort::Value* value) {
  Tensor t;
  ort::ShapeInfo* info = nullptr;
  check(api, api.type_and_shape(value, &info));
  size_t rank = 0;
  ort::Status* status = api.element_type(info, &t.type);
  if (status == nullptr) status = api.dimensions_count(info, &rank);
  t.shape.resize(rank);
  if (status == nullptr) status = api.dimensions(info, t.shape.data(), rank);
  api.release_shape(info);
  check(api, status);
  void* data = nullptr;
  check(api, api.tensor_data(const_cast<ort::Value*>(value), &data));
  t.data = data;
  return t;
}

void require(bool condition, const char* what) {
  if (!condition) throw Error(what);
}

class Kernel {
 public:
  Kernel(const ort::Api& api, const ort::KernelInfo* info) : api_(api), threads_(usable_cores()) {
    size_t count = 0;
    check(api, api.attribute_ints(info, "program", nullptr, &count));
    std::vector<int64_t> words(count);
    check(api, api.attribute_ints(info, "program", words.data(), &count));
    size_t inputs = 0;
    check(api, api.input_count(info, &inputs));
    std::vector<Tensor> tensors(inputs);
    for (size_t i = 0; i < inputs; i++) {
      int constant = 0;
      const ort::Value* value = nullptr;
      check(api, api.constant_input(info, i, &constant, &value));
      if (constant && value != nullptr) tensors[i] = describe(api, value);
    }
    program_ = std::make_unique<Program>(words, tensors);
    team_ = std::make_unique<Team>(program_->phases());
    context_.states.resize(program_->states);
  }

  void compute(ort::Context* context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Context& c = context_;
    auto input = [&](size_t i) {
      const ort::Value* value = nullptr;
      check(api_, api_.input(context, i, &value));
      require(value != nullptr, "an input is missing");
      return describe(api_, value);
    };
    const Tensor source = input(0), logit_rows = input(1 + program_->has_position);
    require(source.shape.size() == size_t(1 + program_->source) && source.shape[0] <= 1 << 24,
            "the first input has another rank");
    c.rows[0] = int(source.shape[0]);
    if (program_->source == 0) {
      require(source.type == kInt64, "token ids must be int64");
      c.ids = static_cast<const int64_t*>(source.data);
      for (int t = 0; t < c.rows[0]; t++) {
        require(c.ids[t] >= 0 && c.ids[t] < program_->vocab, "a token id outside the vocabulary");
      }
    } else {
      require(source.type == kFloat && source.shape[1] == program_->hidden, "embeddings of another width");
      c.embeds = static_cast<const float*>(source.data);
    }
    require(c.rows[0] > 0, "there are no tokens");
    require(logit_rows.type == kInt64 && logit_rows.shape.size() == 1 && logit_rows.shape[0] <= c.rows[0],
            "logit_rows must be int64, at most one for each token");
    c.rows[1] = int(logit_rows.shape[0]);
    c.logit_rows = static_cast<const int64_t*>(logit_rows.data);
    for (int i = 0; i < c.rows[1]; i++) {
      require(c.logit_rows[i] >= 0 && c.logit_rows[i] < c.rows[0], "a row outside the tokens");
    }
    c.position = 0;
    c.capacity = INT64_MAX;
    if (program_->has_position) {
      const Tensor position = input(1);
      require(position.type == kInt64 && position.size() == 1, "position must be one int64");
      c.position = *static_cast<const int64_t*>(position.data);
    }

    for (int i = 0; i < program_->states; i++) {
      const Tensor state = input(program_->first_state() + i);
      std::vector<int64_t> shape = program_->state_shape(i);
      require(state.type == kFloat && state.shape.size() == shape.size(), "a state of another type or rank");
      for (size_t d = 0; d < shape.size(); d++) {
        if (shape[d] < 0) {
          require(c.capacity == INT64_MAX || c.capacity == state.shape[d], "states of different capacity");
          c.capacity = shape[d] = state.shape[d];
        }
      }
      require(shape == state.shape, "a state of another size");
      ort::Value* next = nullptr;
      check(api_, api_.output(context, 1 + i, shape.data(), shape.size(), &next));
      void* data = nullptr;
      check(api_, api_.tensor_data(next, &data));
      if (data != state.data) std::memcpy(data, state.data, state.size() * sizeof(float));
      c.states[i] = static_cast<float*>(data);
    }
    require(c.position >= 0 && c.position <= c.capacity - c.rows[0], "the context is full");
    require(c.position <= program_->positions() - c.rows[0], "a position beyond the model's context");

    program_->prepare(c);
    team_->begin();
    // A little model is done before a second thread has woken up.
    const bool alone = threads_ == 1 || program_->weight_bytes() * c.rows[0] < kAloneBytes;
    if (alone) {
      program_->run(c, *team_, 1);
    } else {
      check(api_, api_.parallel_for(context, &Kernel::task, threads_, threads_, this));
    }

    const int64_t dims[2] = {c.rows[1], program_->vocab};
    ort::Value* logits = nullptr;
    check(api_, api_.output(context, 0, dims, 2, &logits));
    void* data = nullptr;
    check(api_, api_.tensor_data(logits, &data));
    for (int t = 0; t < c.rows[1]; t++) {
      std::memcpy(static_cast<float*>(data) + size_t(t) * program_->vocab, program_->logits.row(c, t),
                  program_->vocab * sizeof(float));
    }
  }

 private:
  static constexpr int64_t kAloneBytes = 256 << 10;
  static void task(void* self, size_t) {
    Kernel* kernel = static_cast<Kernel*>(self);
    if (kernel->team_->over()) return;
    kernel->program_->run(kernel->context_, *kernel->team_, kernel->threads_);
    kernel->team_->finish();
  }

  const ort::Api& api_;
  int threads_;
  std::mutex mutex_;  // one forward at a time: buffers are shared
  std::unique_ptr<Program> program_;
  std::unique_ptr<Team> team_;
  Context context_;
};

const ort::Api* g_api = nullptr;

// No exception may cross into onnxruntime.
template <typename Task>
ort::Status* guarded(Task task) {
  try {
    task();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return g_api->create_status(kFail, "edge_mmllm.Program: no memory");
  } catch (const std::exception& error) {
    return g_api->create_status(kInvalidArgument, (std::string("edge_mmllm.Program: ") + error.what()).c_str());
  }
}

ort::CustomOp make_op() {
  ort::CustomOp op;
  std::memset(&op, 0, sizeof op);
  op.version = ort::kApiVersion;
  op.name = [](const ort::CustomOp*) { return "Program"; };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.input_type = [](const ort::CustomOp*, size_t) { return 0; };  // any
  op.input_types = [](const ort::CustomOp*) { return size_t(1); };
  op.output_type = [](const ort::CustomOp*, size_t) { return kFloat; };
  op.output_types = [](const ort::CustomOp*) { return size_t(1); };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return kVariadic; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return kVariadic; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.variadic_input_least = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_homogeneous = [](const ort::CustomOp*) { return 0; };
  op.variadic_output_least = [](const ort::CustomOp*) { return 1; };
  op.variadic_output_homogeneous = [](const ort::CustomOp*) { return 1; };
  op.create_v2 = [](const ort::CustomOp*, const void* const*, const ort::KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Kernel(*g_api, info); });
  };
  op.compute_v2 = [](void* kernel, ort::Context* context) {
    return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
  };
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return INT32_MAX; };
  return op;
}

}  // namespace

}  // namespace edge

// What onnxruntime calls when the library is registered with a session's options.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) {
  static const void* const* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) return nullptr;  // older than anything we know: the op stays unknown
  static const ort::Api api(table);
  edge::g_api = &api;
  static const ort::CustomOp op = edge::make_op();
  ort::Domain* domain = nullptr;  // lives as long as the options and sessions that use it
  ort::Status* status = api.create_domain("edge_mmllm", &domain);
  if (status == nullptr) status = api.domain_add(domain, &op);
  if (status == nullptr) status = api.add_domain(options, domain);
  return status;
}

// Time by op: starts counting anew, or stops and gives what was counted since (100 entries each).
extern "C" __attribute__((visibility("default"))) void edge_mmllm_profile(int start, double* seconds,
                                                                          int64_t* runs) {
  if (!start) {
    std::memcpy(seconds, edge::g_profile.seconds, sizeof edge::g_profile.seconds);
    std::memcpy(runs, edge::g_profile.runs, sizeof edge::g_profile.runs);
  }
  edge::Program::profile(start != 0);
}
