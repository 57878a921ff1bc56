#include "ops/plain.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <vector>

#include "check.h"

namespace ace {
namespace {

// The kernel for all keys below: one of the arguments is a tensor of that kind.
void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string_view full = schema.name();
  const std::string_view name = full.substr(full.find("::") + 2);
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].isTensor()) check_plain(name, schema.arguments()[i].name(), arguments[i].toTensor());
  }
  ACE_CHECK(false, name, ": arguments must be dense tensors (got tensors of another kind)");
}

}  // namespace

void refuse_other_tensors() {
  static std::vector<torch::Library> registered;  // a registration lasts as long as its library
  using Key = c10::DispatchKey;
  for (const Key key : {Key::Negative, Key::Conjugate, Key::ZeroTensor, Key::SparseCPU, Key::SparseCUDA,
                        Key::SparseCsrCPU, Key::SparseCsrCUDA, Key::QuantizedCPU, Key::QuantizedCUDA,
                        Key::NestedTensorCPU, Key::NestedTensorCUDA, Key::AutogradNestedTensor, Key::MkldnnCPU,
                        Key::SparseMeta, Key::SparseCsrMeta, Key::QuantizedMeta, Key::NestedTensorMeta}) {
    torch::Library library(torch::Library::IMPL, "ace_ext", key, __FILE__, __LINE__);
    for (const c10::OperatorName& op : c10::Dispatcher::singleton().getAllOpNames()) {
      if (op.getNamespace() != "ace_ext") continue;
      const std::string name = op.name.substr(op.name.find("::") + 2);
      library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
    }
    registered.push_back(std::move(library));
  }
}

}  // namespace ace
