#include "perturb.h"

#include "lane_functions.h"
#include "parallel.h"

namespace pu::cpu {

void perturb(const Perturb& p) {
  p.check();
  parallel(p.table.rows, p.threads, [&](int64_t i) { lanes().perturb(p, *p.table.as<Chunk>(i)); });
}

}  // namespace pu::cpu
