// Runs an AOTInductor package (.pt2) without Python: float32 images from a file, logits to a file.
//
//   run net.float.pt2 images.bin C H W logits.bin [repeats]
//
// repeats: then run the first image so often, and print the milliseconds of each.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int count, char** values) {
  if (count != 7 && count != 8) {
    std::fprintf(stderr, "usage: %s net.pt2 images.bin C H W logits.bin [repeats]\n", values[0]);
    return 2;
  }
  std::ifstream file(values[2], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const int64_t c = std::atoll(values[3]), h = std::atoll(values[4]), w = std::atoll(values[5]);
  const int64_t image = c * h * w * static_cast<int64_t>(sizeof(float));
  if (image <= 0 || bytes.empty() || static_cast<int64_t>(bytes.size()) % image != 0) {
    std::fprintf(stderr, "%s holds %zu bytes, which is no number of images of %lld\n", values[2], bytes.size(),
                 static_cast<long long>(image));
    return 1;
  }
  try {
    c10::InferenceMode mode;
    torch::inductor::AOTIModelPackageLoader loader(values[1]);
    const int64_t n = static_cast<int64_t>(bytes.size()) / image;
    const auto images = torch::from_blob(bytes.data(), {n, c, h, w}, torch::kFloat32);
    const auto logits = loader.run({images})[0].contiguous();
    std::ofstream out(values[6], std::ios::binary);
    out.write(static_cast<const char*>(logits.data_ptr()), static_cast<std::streamsize>(logits.nbytes()));
    const auto first = images.slice(0, 0, 1).contiguous();
    for (int i = count == 8 ? std::atoi(values[7]) : 0; i > 0; i--) {
      const auto start = std::chrono::steady_clock::now();
      loader.run({first});
      const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
      std::printf("%.6f\n", taken.count());
    }
    return out ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", values[1], error.what());
    return 1;
  }
}
