#include "perturb.h"

#include <cstring>

#include "parallel.h"
#include "token_stats.h"  // the instruction set in use

namespace pu::cpu {

void perturb(const Perturb& p, const Matrix& table, int threads) {
  check(p);
  PerturbChunk chunk = portable_perturb();
#if defined(PU_X86)
  if (std::strcmp(lanes().name, "avx2") == 0) chunk = avx2_perturb();
  if (std::strcmp(lanes().name, "avx512") == 0) chunk = avx512_perturb();
#endif
  parallel(table.rows, threads, [&](int64_t i) { chunk(p, *table.as<Chunk>(i)); });
}

}  // namespace pu::cpu
