// Copyright (c) mmseg_textkd contributors. All rights reserved.
//
// Segment an image with OpenVINO alone:
//
//   segment FOLDER picture.ppm classes.ppm
//
// FOLDER is one of `tools/deployment/deploy.py ... --to openvino`, with the
// normalization in the graph (the default). Images are binary PPM, which
// every image program writes; use the image library that you have instead.
#include <chrono>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <limits>
#include <openvino/openvino.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
  size_t height, width;
  std::vector<uint8_t> rgb;
};

struct Class {
  int red, green, blue;
  std::string name;
};

Picture read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  size_t width = 0, height = 0, largest = 0;
  file >> kind;
  for (size_t* number : {&width, &height, &largest}) {
    while ((file >> std::ws).peek() == '#')  // a comment, as GIMP writes
      file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    file >> *number;
  }
  if (!file || kind != "P6" || largest != 255 || width * height == 0 ||
      width * height > 89478485)
    throw std::runtime_error(path + " is no binary PPM of 8 bits");
  file.get();  // the one blank before the pixels
  Picture picture{height, width, std::vector<uint8_t>(3 * width * height)};
  if (!file.read(reinterpret_cast<char*>(picture.rgb.data()),
                 picture.rgb.size()))
    throw std::runtime_error(path + " is cut short");
  return picture;
}

void write_ppm(const std::string& path, const Picture& picture) {
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << picture.width << ' ' << picture.height << "\n255\n";
  file.write(reinterpret_cast<const char*>(picture.rgb.data()),
             picture.rgb.size());
  if (!file) throw std::runtime_error("cannot write " + path);
}

std::vector<Class> read_classes(const std::string& path) {
  std::ifstream file(path);
  std::vector<Class> classes;
  for (std::string line; std::getline(file, line);) {
    std::istringstream row(line);
    Class found;
    if (row >> found.red >> found.green >> found.blue >> std::ws &&
        std::getline(row, found.name))
      classes.push_back(found);
  }
  if (classes.empty()) throw std::runtime_error(path + " names no classes");
  return classes;
}

// The graph takes bytes, NHWC, BGR, of its size; this one any size and RGB.
ov::CompiledModel load(const std::string& folder) {
  ov::Core core;
  auto model = core.read_model(folder + "/model.xml");
  if (model->input().get_element_type() != ov::element::u8)
    throw std::runtime_error(folder + " was deployed with --no-preprocess");
  ov::preprocess::PrePostProcessor steps(model);
  steps.input()
      .tensor()
      .set_layout("NHWC")
      .set_color_format(ov::preprocess::ColorFormat::RGB)
      .set_spatial_dynamic_shape();
  steps.input()
      .preprocess()
      .convert_color(ov::preprocess::ColorFormat::BGR)
      .resize(ov::preprocess::ResizeAlgorithm::RESIZE_LINEAR);
  steps.input().model().set_layout("NHWC");
  return core.compile_model(steps.build(), "CPU",
                            ov::hint::inference_precision(ov::element::f32));
}

int run(const std::string& folder, const std::string& in,
        const std::string& out) {
  const auto classes = read_classes(folder + "/classes.txt");
  auto picture = read_ppm(in);
  auto request = load(folder).create_infer_request();
  request.set_input_tensor(ov::Tensor(ov::element::u8,
                                      {1, picture.height, picture.width, 3},
                                      picture.rgb.data()));
  const auto start = std::chrono::steady_clock::now();
  request.infer();
  const std::chrono::duration<double, std::milli> took =
      std::chrono::steady_clock::now() - start;
  const ov::Tensor scores = request.get_output_tensor();
  const ov::Shape shape = scores.get_shape();
  if (shape.size() != 4 || shape[1] != classes.size())
    throw std::runtime_error("deploy it with --output logits");
  const float* score = scores.data<float>();
  const size_t height = shape[2], width = shape[3], area = height * width;
  std::vector<size_t> counts(classes.size());
  for (size_t y = 0; y < picture.height; ++y)
    for (size_t x = 0; x < picture.width; ++x) {
      const size_t pixel = y * height / picture.height * width +
                           x * width / picture.width;
      size_t best = 0;
      for (size_t k = 1; k < classes.size(); ++k)
        if (score[k * area + pixel] > score[best * area + pixel]) best = k;
      ++counts[best];
      uint8_t* shown = &picture.rgb[3 * (y * picture.width + x)];
      shown[0] = classes[best].red;
      shown[1] = classes[best].green;
      shown[2] = classes[best].blue;
    }
  write_ppm(out, picture);
  std::cout << took.count() << " ms\n";
  for (size_t k = 0; k < classes.size(); ++k)
    if (counts[k]) std::cout << classes[k].name << ' ' << counts[k] << '\n';
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: segment FOLDER picture.ppm classes.ppm\n";
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::cerr << "Error: " << error.what() << '\n';
    return 1;
  }
}
