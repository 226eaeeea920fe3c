// The part of onnxruntime's C interface that a custom op needs, as a table of its own.
//
// The interface is a struct of function pointers that only ever grows at its end, so a function's
// place is fixed for good. Places: onnxruntime's C API as of version 1.17 (`OrtApi` in
// onnxruntime_c_api.h), the first that has ParallelFor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace ort {

constexpr uint32_t kApiVersion = 17;

struct Status;
struct SessionOptions;
struct Domain;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct Context;

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

enum Place {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kContextGetInputCount = 88,
  kContextGetInput = 90,
  kContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseShapeInfo = 99,
  kReleaseDomain = 101,
  kInfoGetAttributeInts = 163,
  kInfoGetInputCount = 230,
  kInfoGetConstantInput = 249,
  kContextParallelFor = 274,
};

// The functions used, with their types.
struct Api {
  Status* (*create_status)(int code, const char* message);
  const char* (*error_message)(const Status*);
  Status* (*create_domain)(const char* name, Domain** out);
  Status* (*domain_add)(Domain*, const struct CustomOp*);
  Status* (*add_domain)(SessionOptions*, Domain*);
  Status* (*tensor_data)(Value*, void** out);
  Status* (*element_type)(const ShapeInfo*, int* out);
  Status* (*dimensions_count)(const ShapeInfo*, size_t* out);
  Status* (*dimensions)(const ShapeInfo*, int64_t* values, size_t count);
  Status* (*type_and_shape)(const Value*, ShapeInfo** out);
  Status* (*input)(const Context*, size_t index, const Value** out);
  Status* (*output)(Context*, size_t index, const int64_t* dims, size_t count, Value** out);
  void (*release_status)(Status*);
  void (*release_shape)(ShapeInfo*);
  void (*release_domain)(Domain*);
  Status* (*attribute_ints)(const KernelInfo*, const char* name, int64_t* out, size_t* size);
  Status* (*input_count)(const KernelInfo*, size_t* out);
  Status* (*constant_input)(const KernelInfo*, size_t index, int* constant, const Value** out);
  Status* (*parallel_for)(const Context*, void (*task)(void*, size_t), size_t total, size_t batches,
                          void* data);

  explicit Api(const void* const* table) {
    auto take = [&](auto& function, Place place) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(
          const_cast<void*>(table[place]));
    };
    take(create_status, kCreateStatus);
    take(error_message, kGetErrorMessage);
    take(create_domain, kCreateCustomOpDomain);
    take(domain_add, kCustomOpDomainAdd);
    take(add_domain, kAddCustomOpDomain);
    take(tensor_data, kGetTensorMutableData);
    take(element_type, kGetTensorElementType);
    take(dimensions_count, kGetDimensionsCount);
    take(dimensions, kGetDimensions);
    take(type_and_shape, kGetTensorTypeAndShape);
    take(input, kContextGetInput);
    take(output, kContextGetOutput);
    take(release_status, kReleaseStatus);
    take(release_shape, kReleaseShapeInfo);
    take(release_domain, kReleaseDomain);
    take(attribute_ints, kInfoGetAttributeInts);
    take(input_count, kInfoGetInputCount);
    take(constant_input, kInfoGetConstantInput);
    take(parallel_for, kContextParallelFor);
  }
};

// What onnxruntime calls to know a custom op and to run it: `OrtCustomOp`, in its order.
struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const void* const* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_types)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_types)(const CustomOp*);
  void (*compute)(void* kernel, Context*);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_homogeneous)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_v2)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, Context*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  // Versions up to kApiVersion read no further.
  void* later[8];
};

}  // namespace ort
