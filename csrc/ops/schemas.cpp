// Every operator's schema. Read this first.
//
// Common arguments
//   labels        [...] int64, aligned with the rows of logits or hidden; ignore_index: not scored
//   temperature, softcap, logit_scale
//                 z = softcap tanh(logit_scale (x W^T + b) / softcap) / temperature; softcap 0:
//                 none
//   metrics       bits: 1 entropy, 2 log_sum_sq_probs, 4 mean_logits, 8 is_top1
// Results per row are shaped like labels, fp32 (fp64 for fp64 inputs), 0 where not scored. Tensors
// that only backward reads are marked [saved]; their rows are the scored positions in order, and
// rows past the number of scored positions are zero unless stated. (What a device saves is its own:
// "CUDA:" tells where it differs.) All tensors of a call are on one device.
//
// Labels outside [0, V) raise; CUDA: their rows give NaN, and raise with FUSEDPO_CHECK=1 in the
// environment.
#include "ops/stable.h"

STABLE_TORCH_LIBRARY(fusedpo, m) {
  // Log-probs from logits [..., V].
  // inplace_backward only tells backward to write over logits.
  // stats [saved] [N, 3]: max z, log sum exp(z - max), 1 - p_label; CUDA: a row per position.
  m.def(
      "token_logps(Tensor logits, Tensor labels, int ignore_index, float temperature, int metrics,"
      " bool inplace_backward=False)"
      " -> (Tensor logps, Tensor? entropy, Tensor? log_sum_sq_probs, Tensor? mean_logits,"
      " Tensor? is_top1, Tensor stats)");

  // d loss / d logits, a new tensor of logits' dtype.
  m.def(
      "token_logps_backward(Tensor? grad_logps, Tensor? grad_entropy, Tensor logits, Tensor labels,"
      " Tensor? entropy, Tensor stats, int ignore_index, float temperature) -> Tensor");

  // The same, written over logits.
  m.def(
      "token_logps_backward_(Tensor? grad_logps, Tensor? grad_entropy, Tensor(a!) logits,"
      " Tensor labels, Tensor? entropy, Tensor stats, int ignore_index, float temperature) -> ()");

  // Log-probs from hidden [..., H] and weight [V, H]; with lora_hidden [..., r] and lora_weight
  // [V, r] the product is x W^T + u B^T. The arithmetic is that of F.linear in compute_dtype:
  // operands are rounded to it tile by tile, never as a whole.
  //   vocab_tile  vocabulary entries per GEMM; CUDA: only where a GEMM needs room of its own, for
  //               operands that are cast or sums in fp32
  //   want_grads  bits, what is formed now by one more GEMM: 1 d logp / d hidden, 8 d logp / d
  //               lora_hidden
  //   keep_rows   at most how many scored rows' exp(z - anchor) are kept for the gradients of
  //               weight, bias and lora_weight; later rows are recomputed. (Not the number itself:
  //               it depends on N, and would be a new graph for every batch shape.)
  // stats [saved] [N, 4]: max z, log sum exp(z - max), 1 - p_label, 1 - tanh^2 at the label.
  // unit_grad [saved] [N, H], lora_unit_grad [N, r]: d logp / d hidden, fp32 (fp64).
  // kept [saved] [min(keep_rows, N), V] in compute_dtype: tile after tile, each [kept rows,
  // columns]; unspecified past the scored rows. anchors [saved] [min(keep_rows, N), tiles]: each
  // tile's anchor. CUDA: kept is [min(keep_rows, N), V rounded up to 64], d logp / d x of each row;
  // no anchors.
  // count [saved] [1] int64 on the CPU: scored rows; CUDA: -1 under graph capture, where the host
  // does not know.
  m.def(
      "linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden,"
      " Tensor? lora_weight, Tensor labels, int ignore_index, float temperature, float softcap,"
      " float logit_scale, int metrics, ScalarType compute_dtype, int vocab_tile, int want_grads,"
      " int keep_rows)"
      " -> (Tensor logps, Tensor? entropy, Tensor? log_sum_sq_probs, Tensor? mean_logits,"
      " Tensor? is_top1, Tensor stats, Tensor? unit_grad, Tensor? lora_unit_grad, Tensor? kept,"
      " Tensor? anchors, Tensor count)");

  // d loss / d hidden (or lora_hidden) from its unit gradient: row t scaled by grad_logps[t].
  m.def(
      "linear_token_logps_backward_hidden(Tensor grad_logps, Tensor unit_grad, Tensor labels,"
      " int ignore_index, ScalarType dtype) -> Tensor");

  // The gradients that need the vocabulary again. needs, bits: 1 hidden, 2 weight, 4 bias,
  // 8 lora_hidden, 16 lora_weight; a gradient not needed is None. Each has its input's shape and
  // dtype. With grad_entropy everything is recomputed, else rows in `kept` are not.
  m.def(
      "linear_token_logps_backward(Tensor? grad_logps, Tensor? grad_entropy, Tensor hidden,"
      " Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, Tensor labels,"
      " Tensor? entropy, Tensor stats, Tensor? kept, Tensor? anchors, Tensor count,"
      " int ignore_index, float temperature, float softcap, float logit_scale, ScalarType "
      "compute_dtype,"
      " int vocab_tile, int needs)"
      " -> (Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? lora_hidden,"
      " Tensor? lora_weight)");

  // A list of paired losses over [B] log-probs: sum_k weights[k] losses[k], and its derivatives.
  //   losses         codes of PairLoss (csrc/core/loss_pair.h); f_divergence those of FDivergence
  //   nll_weights    the factor of chosen_nll ([B] or 0-d) within each loss
  //   reduction      of `loss`: 0 mean, 1 sum; needs, bits: 1 chosen_logps, 2 rejected_logps,
  //                  4 ref_chosen_logps, 8 ref_rejected_logps, 16 chosen_nll
  // gradients [saved]: a row [B], d losses[b] / d input[b], for every bit of needs; after them a
  // row by sorted position for each loss that sorts the batch (aot, aot_unpaired), whose
  // permutations are the rows of order [saved]. chosen_logps...: fp32 or fp64, and all results like
  // them.
  m.def(
      "preference_loss(Tensor chosen_logps, Tensor rejected_logps, Tensor? ref_chosen_logps,"
      " Tensor? ref_rejected_logps, Tensor? chosen_lengths, Tensor? rejected_lengths,"
      " Tensor? chosen_nll, Tensor? pair_weights, int[] losses, float[] weights,"
      " float[] nll_weights, float beta, float label_smoothing, int f_divergence, float f_alpha,"
      " float discopop_tau, float simpo_gamma, float alpha, int reduction, int needs)"
      " -> (Tensor loss, Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards,"
      " Tensor margins, Tensor accuracies, Tensor? gradients, Tensor? order)");

  // One unpaired loss over [B] log-probs; labels are bool, true where desirable. shift is kto's kl
  // or bco's delta; shift_value, one number on the device, takes its place. gradients as above,
  // with the bits 1 logps and 4 ref_logps.
  m.def(
      "unpaired_loss(Tensor logps, Tensor ref_logps, Tensor labels, Tensor? shift_value, int loss,"
      " float beta, float shift, float desirable_weight, float undesirable_weight, int reduction,"
      " int needs) -> (Tensor loss, Tensor losses, Tensor rewards, Tensor? gradients)");

  // The gradients of both: what forward saved, times the upstream gradients. sorted, bits: 1 aot,
  // 2 aot_unpaired; one_nll: chosen_nll was 0-d. An input not in needs gets None.
  m.def(
      "loss_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor gradients, Tensor? order,"
      " int needs, int sorted, int reduction, bool one_nll)"
      " -> (Tensor? chosen_logps, Tensor? rejected_logps, Tensor? ref_chosen_logps,"
      " Tensor? ref_rejected_logps, Tensor? chosen_nll)");

  // Whether a length ([B] int64) is below 1. An operator of its own because only a step outside a
  // compiled graph asks.
  m.def("has_empty_completion(Tensor chosen_lengths, Tensor rejected_lengths) -> bool");

  // JSON: the CPU kernels' instruction set and the route of bf16 GEMMs.
  m.def("cpu_info() -> str");

  // JSON: the CUDA runtime linked in and the newest one the driver serves (0 without a driver).
  m.def("cuda_info() -> str");
}
