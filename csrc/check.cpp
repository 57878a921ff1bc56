#include "check.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/isfinite.h>

#include <string>

#include "core/nm_select.h"

namespace ace {
namespace {

// The bytes from the first element to the end of the last one.
struct Extent {
  explicit Extent(const at::Tensor& t)
      : begin(t.storage_offset() * t.element_size()),
        end(at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), t.storage_offset())) {}

  size_t begin, end;
};

bool is_symbolic(const at::Tensor& t) { return t.is_meta(); }  // no memory behind it

// Column slices of one matrix share elements if their columns overlap. All other tensors are taken to share some if
// their extents overlap. A pitch of 0 is that of a single row, which may be a row of an expanded tensor.
bool share_elements(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || !a.storage().is_alias_of(b.storage())) return false;
  const Extent x(a), y(b);
  if (x.end <= y.begin || y.end <= x.begin) return false;
  if (a.dim() != 2 || b.dim() != 2 || a.element_size() != b.element_size() || a.stride(0) != b.stride(0)) return true;
  const int64_t pitch = a.stride(0), shift = b.storage_offset() - a.storage_offset();
  if (pitch == 0) return true;
  const int64_t column = ((shift % pitch) + pitch) % pitch;  // of b's first, counted from a's first
  return column < a.size(1) || column + b.size(1) > pitch;
}

// Whether several of its elements lie at one address, as in what expand() returns.
bool is_expanded(const at::Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1 && t.stride(d) == 0) return true;
  }
  return false;
}

// Ends a message about the strides of t.
std::string got_strides(const at::Tensor& t) {
  if (!is_expanded(t)) return c10::str("(got strides ", t.strides(), ")");
  return c10::str("(got strides ", t.strides(), "; it is expanded: its ", t.dim() > 1 ? "rows" : "elements",
                  " share memory; call .contiguous() or .clone())");
}

void check_rows(std::string_view op, std::string_view argument, const at::Tensor& t) {
  ACE_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", argument, " must have contiguous columns, stride(1) == 1 ",
            got_strides(t));
  ACE_CHECK(t.size(0) <= 1 || t.size(1) == 0 || t.stride(0) >= t.size(1), op, ": ", argument,
            " must have rows that do not overlap, stride(0) >= ", t.size(1), " ", got_strides(t));
}

void check_kind(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                at::IntArrayRef shape) {
  check_plain(op, argument, t);
  ACE_CHECK(t.scalar_type() == dtype, op, ": ", argument, " must be ", dtype, " (got ", t.scalar_type(), ")");
  ACE_CHECK(t.sizes() == shape, op, ": ", argument, " must have shape ", shape, " (got ", t.sizes(), ")");
}

}  // namespace

void check_plain(std::string_view op, std::string_view argument, const at::Tensor& t) {
  ACE_CHECK(!t.is_nested(), op, ": ", argument, " must be a dense tensor (got a nested one; give its parts)");
  ACE_CHECK(t.layout() == at::kStrided, op, ": ", argument, " must be a dense tensor (got layout ", t.layout(),
            "; call .to_dense())");
  ACE_CHECK(!t.is_quantized(), op, ": ", argument, " must not be quantized (got ", t.scalar_type(),
            "; call .dequantize())");
  ACE_CHECK(!t.is_neg(), op, ": ", argument,
            " must not be a negative view (got one: its memory holds the negated values; call .resolve_neg())");
  ACE_CHECK(!t.is_conj(), op, ": ", argument, " must be real (got a conjugate view; call .resolve_conj())");
  ACE_CHECK(!t._is_zerotensor(), op, ": ", argument,
            " must have memory (got one of torch's zero tensors, which have none)");
  if (is_symbolic(t) || t.numel() == 0) return;
  const size_t there = t.storage().nbytes(), needed = Extent(t).end;
  ACE_CHECK(needed <= there, op, ": ", argument, " must lie within its storage, ", needed, " bytes (got ", there, ")");
}

void check_2d(std::string_view op, std::string_view argument, const at::Tensor& t) {
  check_plain(op, argument, t);
  ACE_CHECK(t.dim() == 2, op, ": ", argument, " must have 2 dimensions (got ", t.dim(), ")");
}

void check_matrix(std::string_view op, std::string_view argument, const at::Tensor& t) {
  check_2d(op, argument, t);
  const at::ScalarType dtype = t.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": ", argument,
            " must be float32, float16 or bfloat16 (got ", dtype, ")");
  check_rows(op, argument, t);
}

void check_same_device(std::string_view op, std::string_view argument, const at::Tensor& t, const at::Tensor& like) {
  ACE_CHECK(t.device() == like.device(), op, ": ", argument, " must be on ", like.device(),
            " like the other tensors (got ", t.device(), ")");
}

void check_dense(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                 at::IntArrayRef shape) {
  check_kind(op, argument, t, dtype, shape);
  ACE_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous ", got_strides(t));
}

void check_like(std::string_view op, std::string_view argument, const at::Tensor& t, at::ScalarType dtype,
                at::IntArrayRef shape, const at::Tensor& weight) {
  check_same_device(op, argument, t, weight);
  check_kind(op, argument, t, dtype, shape);
  check_rows(op, argument, t);
}

bool is_same_view(const at::Tensor& a, const at::Tensor& b) {
  return a.storage().is_alias_of(b.storage()) && a.storage_offset() == b.storage_offset() &&
         a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

void check_apart(std::string_view op, std::initializer_list<Named> written, std::initializer_list<Named> read) {
  const auto check = [&](const Named& target, const Named& other) {
    if (other.tensor == nullptr || is_symbolic(*target.tensor)) return;
    ACE_CHECK(!share_elements(*target.tensor, *other.tensor), op, ": ", target.argument, " must not share memory with ",
              other.argument, ", because the op writes it (got an overlap; clone one of them)");
  };
  for (const Named* target = written.begin(); target != written.end(); ++target) {
    for (const Named* other = target + 1; other != written.end(); ++other) check(*target, *other);
    for (const Named& other : read) check(*target, other);
  }
}

void check_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m) {
  ACE_CHECK(group_m >= 1 && group_m <= kMaxGroup, op, ": group_m must be from 1 to ", kMaxGroup, " (got ", group_m,
            ")");
  ACE_CHECK(keep_n >= 0 && keep_n <= group_m, op, ": keep_n must be from 0 to ", group_m, " (got ", keep_n, ")");
  ACE_CHECK(weight.size(1) % group_m == 0, op, ": group_m must divide the ", weight.size(1), " columns of weight (got ",
            group_m, ")");
}

void check_optional_nm(std::string_view op, const at::Tensor& weight, int64_t keep_n, int64_t group_m) {
  if (keep_n != 0 || group_m != 0) check_nm(op, weight, keep_n, group_m);
}

void refuse_not_finite(std::string_view op, std::string_view argument, const at::Tensor& t) {
  const at::Tensor bad = at::isfinite(t).logical_not().nonzero();
  if (bad.size(0) == 0) return;
  const at::Tensor index = bad[0];
  std::string place;
  at::Tensor value = t;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t at = index[d].item<int64_t>();
    place += (d ? ", " : "") + std::to_string(at);
    value = value[at];
  }
  ACE_CHECK(false, op, ": ", argument, " must be finite (got ", value.item<double>(), " at index [", place, "])");
}

void report_not_finite(std::string_view op, const at::Tensor& weight, const OptionalTensor& column,
                       const OptionalTensor& moment, int64_t row, int64_t col) {
  refuse_not_finite(op, "weight", weight);
  if (column) refuse_not_finite(op, "column", *column);
  if (moment) refuse_not_finite(op, "moment", *moment);
  TORCH_CHECK_VALUE(false, op, ": score must be finite (got an overflow, or the root of a negative moment, at index [",
                    row, ", ", col, "]; check the scale of column and moment)");
}

}  // namespace ace
