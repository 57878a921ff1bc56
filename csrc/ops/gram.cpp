#include "ops/gram.h"

#include <torch/library.h>

#include "check.h"

namespace ace {

void check_update_gram(const at::Tensor& gram, const at::Tensor& x) {
  constexpr std::string_view op = "update_gram_";
  check_matrix(op, "x", x);
  check_same_device(op, "gram", gram, x);
  check_dense(op, "gram", gram, at::kFloat, {x.size(1), x.size(1)});
  check_apart(op, {named("gram", gram)}, {named("x", x)});
}

namespace {

void update_gram_meta(at::Tensor gram, const at::Tensor& x, bool) { check_update_gram(gram, x); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) { m.def("update_gram_(Tensor(a!) gram, Tensor x, bool mirror=True) -> ()"); }

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) { m.impl("update_gram_", &update_gram_meta); }

}  // namespace ace
