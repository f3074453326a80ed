// The graph half of the stand-in: as much of libgraph and libge_runner as torchair's own library calls.
//
// A graph is kept as the serialized ModelDef that torchair made; whether it is static and what its outputs are is read
// from there. Running it is Python's work (ge_interpreter.py), through a callback. The classes repeat the layout of
// CANN's public headers as far as the ABI needs them.

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host_cann.h"

extern "C" {
typedef int (*add_graph_callback)(uint32_t id, const char* proto, uint64_t len, const char* options);
typedef int (*run_graph_callback)(uint32_t id, int n_in, HostTensor* in, int n_out, HostTensor* out);
static add_graph_callback g_add = nullptr;
static run_graph_callback g_run = nullptr;
void host_cann_set_ge_callbacks(add_graph_callback add, run_graph_callback run) {
  g_add = add;
  g_run = run;
}
}

// What operators take and give, as Python registered it (host_cann_register_ir).
struct Ir {
  std::vector<std::pair<std::string, std::string>> in, out, attr;
};
static std::map<std::string, Ir> g_ir;

namespace ge {
typedef uint32_t Status;
typedef uint32_t graphStatus;
typedef char char_t;
enum Format : int32_t {};
enum DataType : int32_t {};
enum Placement : int32_t { kHost = 0, kDevice = 1 };
class AscendString {
 public:
  AscendString() = default;
  ~AscendString() = default;
  AscendString(const char_t* n);
  AscendString(const char_t* n, size_t l);
  const char_t* GetString() const;
  bool operator<(const AscendString& d) const;
  bool operator==(const AscendString& d) const;
  std::shared_ptr<std::string> name_;
};
AscendString::AscendString(const char_t* n) : name_(n ? std::make_shared<std::string>(n) : nullptr) {}
AscendString::AscendString(const char_t* n, size_t l) : name_(n ? std::make_shared<std::string>(n, l) : nullptr) {}
const char_t* AscendString::GetString() const { return name_ ? name_->c_str() : ""; }
bool AscendString::operator<(const AscendString& d) const { return strcmp(GetString(), d.GetString()) < 0; }
bool AscendString::operator==(const AscendString& d) const { return strcmp(GetString(), d.GetString()) == 0; }

struct ShapeImpl {
  std::vector<int64_t> d;
};
class Shape {
 public:
  Shape();
  explicit Shape(const std::vector<int64_t>& dims);
  std::vector<int64_t> GetDims() const;
  std::shared_ptr<ShapeImpl> impl_;
};
Shape::Shape() : impl_(std::make_shared<ShapeImpl>()) {}
Shape::Shape(const std::vector<int64_t>& dims) : impl_(std::make_shared<ShapeImpl>()) { impl_->d = dims; }
std::vector<int64_t> Shape::GetDims() const { return impl_ ? impl_->d : std::vector<int64_t>(); }

struct TensorDescImpl {
  std::vector<int64_t> shape, oshape;
  Format f{(Format)2}, of{(Format)2};
  DataType dt{(DataType)0};
  Placement p{kHost};
};
class TensorDesc {
 public:
  TensorDesc();
  TensorDesc(const TensorDesc&);
  TensorDesc(TensorDesc&&);
  TensorDesc& operator=(const TensorDesc&);
  TensorDesc& operator=(TensorDesc&&);
  Shape GetShape() const;
  void SetShape(const Shape&);
  Format GetFormat() const;
  void SetFormat(Format);
  Shape GetOriginShape() const;
  void SetOriginShape(const Shape&);
  Format GetOriginFormat() const;
  void SetOriginFormat(Format);
  DataType GetDataType() const;
  void SetDataType(DataType);
  void SetPlacement(Placement);
  Placement GetPlacement() const;
  std::shared_ptr<TensorDescImpl> impl;
};
TensorDesc::TensorDesc() : impl(std::make_shared<TensorDescImpl>()) {}
TensorDesc::TensorDesc(const TensorDesc& o) : impl(std::make_shared<TensorDescImpl>(*o.impl)) {}
TensorDesc::TensorDesc(TensorDesc&& o) : impl(std::make_shared<TensorDescImpl>(*o.impl)) {}
TensorDesc& TensorDesc::operator=(const TensorDesc& o) {
  *impl = *o.impl;
  return *this;
}
TensorDesc& TensorDesc::operator=(TensorDesc&& o) {
  *impl = *o.impl;
  return *this;
}
Shape TensorDesc::GetShape() const { return Shape(impl->shape); }
void TensorDesc::SetShape(const Shape& s) { impl->shape = s.GetDims(); }
Format TensorDesc::GetFormat() const { return impl->f; }
void TensorDesc::SetFormat(Format f) { impl->f = f; }
Shape TensorDesc::GetOriginShape() const { return Shape(impl->oshape); }
void TensorDesc::SetOriginShape(const Shape& s) { impl->oshape = s.GetDims(); }
Format TensorDesc::GetOriginFormat() const { return impl->of; }
void TensorDesc::SetOriginFormat(Format f) { impl->of = f; }
DataType TensorDesc::GetDataType() const { return impl->dt; }
void TensorDesc::SetDataType(DataType d) { impl->dt = d; }
void TensorDesc::SetPlacement(Placement p) { impl->p = p; }
Placement TensorDesc::GetPlacement() const { return impl->p; }

struct TensorImpl {
  TensorDescImpl desc;
  uint8_t* data{nullptr};
  size_t size{0};
  std::function<void(uint8_t*)> del;
  ~TensorImpl() {
    if (data && del) del(data);
  }
};
class Tensor {
 public:
  using DeleteFunc = std::function<void(uint8_t*)>;
  Tensor();
  ~Tensor() = default;
  TensorDesc GetTensorDesc() const;
  graphStatus SetTensorDesc(const TensorDesc&);
  const uint8_t* GetData() const;
  uint8_t* GetData();
  size_t GetSize() const;
  std::unique_ptr<uint8_t[], Tensor::DeleteFunc> ResetData();
  graphStatus SetData(const uint8_t* d, size_t n);
  graphStatus SetData(uint8_t* d, size_t n, const Tensor::DeleteFunc& f);
  graphStatus ResetData(uint8_t* d, size_t n, const Tensor::DeleteFunc& f);
  graphStatus SetOriginShapeDimNum(const size_t);
  size_t GetOriginShapeDimNum() const;
  graphStatus SetOriginShapeDim(const size_t, const int64_t);
  graphStatus SetShapeDimNum(const size_t);
  size_t GetShapeDimNum() const;
  graphStatus SetShapeDim(const size_t, const int64_t);
  int64_t GetShapeDim(const size_t) const;
  graphStatus SetFormat(const Format&);
  Format GetFormat() const;
  graphStatus SetDataType(const DataType&);
  DataType GetDataType() const;
  graphStatus SetPlacement(const Placement&);
  Placement GetPlacement() const;
  std::shared_ptr<TensorImpl> impl;
};
Tensor::Tensor() : impl(std::make_shared<TensorImpl>()) {}
TensorDesc Tensor::GetTensorDesc() const {
  TensorDesc d;
  *d.impl = impl->desc;
  return d;
}
graphStatus Tensor::SetTensorDesc(const TensorDesc& d) {
  impl->desc = *d.impl;
  return 0;
}
const uint8_t* Tensor::GetData() const { return impl->data; }
uint8_t* Tensor::GetData() { return impl->data; }
size_t Tensor::GetSize() const { return impl->size; }
std::unique_ptr<uint8_t[], Tensor::DeleteFunc> Tensor::ResetData() {
  std::unique_ptr<uint8_t[], Tensor::DeleteFunc> r(impl->data, impl->del ? impl->del : DeleteFunc([](uint8_t*) {}));
  impl->data = nullptr;
  impl->size = 0;
  impl->del = nullptr;
  return r;
}
graphStatus Tensor::SetData(const uint8_t* d, size_t n) {
  uint8_t* q = new uint8_t[n ? n : 1];
  memcpy(q, d, n);
  return ResetData(q, n, [](uint8_t* p) { delete[] p; });
}
graphStatus Tensor::SetData(uint8_t* d, size_t n, const Tensor::DeleteFunc& f) { return ResetData(d, n, f); }
graphStatus Tensor::ResetData(uint8_t* d, size_t n, const Tensor::DeleteFunc& f) {
  if (impl->data && impl->del && impl->data != d) impl->del(impl->data);
  impl->data = d;
  impl->size = n;
  impl->del = f;
  return 0;
}
graphStatus Tensor::SetOriginShapeDimNum(const size_t n) {
  impl->desc.oshape.resize(n);
  return 0;
}
size_t Tensor::GetOriginShapeDimNum() const { return impl->desc.oshape.size(); }
graphStatus Tensor::SetOriginShapeDim(const size_t i, const int64_t v) {
  impl->desc.oshape.at(i) = v;
  return 0;
}
graphStatus Tensor::SetShapeDimNum(const size_t n) {
  impl->desc.shape.resize(n);
  return 0;
}
size_t Tensor::GetShapeDimNum() const { return impl->desc.shape.size(); }
graphStatus Tensor::SetShapeDim(const size_t i, const int64_t v) {
  impl->desc.shape.at(i) = v;
  return 0;
}
int64_t Tensor::GetShapeDim(const size_t i) const { return impl->desc.shape.at(i); }
graphStatus Tensor::SetFormat(const Format& f) {
  impl->desc.f = f;
  return 0;
}
Format Tensor::GetFormat() const { return impl->desc.f; }
graphStatus Tensor::SetDataType(const DataType& d) {
  impl->desc.dt = d;
  return 0;
}
DataType Tensor::GetDataType() const { return impl->desc.dt; }
graphStatus Tensor::SetPlacement(const Placement& p) {
  impl->desc.p = p;
  return 0;
}
Placement Tensor::GetPlacement() const { return impl->desc.p; }
AscendString GetFormatName(Format) { return AscendString("ND"); }

// ---- minimal protobuf wire reader for ge.proto.ModelDef / GraphDef
struct Rd {
  const uint8_t *p, *e;
  uint64_t vi() {
    uint64_t r = 0;
    int s = 0;
    while (p < e) {
      uint8_t b = *p++;
      r |= uint64_t(b & 127) << s;
      if (!(b & 128)) break;
      s += 7;
    }
    return r;
  }
  bool next(uint32_t& f, uint32_t& w, uint64_t& v, Rd& sub) {
    if (p >= e) return false;
    uint64_t t = vi();
    f = t >> 3;
    w = t & 7;
    v = 0;
    if (w == 0)
      v = vi();
    else if (w == 1)
      p += 8;
    else if (w == 5)
      p += 4;
    else if (w == 2) {
      uint64_t n = vi();
      sub.p = p;
      sub.e = p + n;
      p += n;
    } else
      return false;
    return true;
  }
  std::string str() const { return std::string((const char*)p, e - p); }
};
struct Desc {
  int dt = 0;
  std::vector<int64_t> dims;
};
struct Op {
  std::string name, type;
  std::vector<Desc> in, out;
};
static Desc rd_desc(Rd r) {
  Desc d;
  uint32_t f, w;
  uint64_t v;
  Rd s;
  while (r.next(f, w, v, s)) {
    if (f == 2 && w == 0)
      d.dt = v;
    else if (f == 3 && w == 2) {
      uint32_t f2, w2;
      uint64_t v2;
      Rd s2;
      Rd q = s;
      while (q.next(f2, w2, v2, s2))
        if (f2 == 1) {
          if (w2 == 0)
            d.dims.push_back((int64_t)v2);
          else
            while (s2.p < s2.e)
              d.dims.push_back((int64_t)s2.vi());
        }
    }
  }
  return d;
}
static void rd_graph(Rd r, std::vector<Op>& ops) {
  uint32_t f, w;
  uint64_t v;
  Rd s;
  while (r.next(f, w, v, s))
    if (f == 6 && w == 2) {
      Op o;
      uint32_t f2, w2;
      uint64_t v2;
      Rd s2;
      Rd q = s;
      while (q.next(f2, w2, v2, s2)) {
        if (w2 != 2) continue;
        if (f2 == 1)
          o.name = s2.str();
        else if (f2 == 2)
          o.type = s2.str();
        else if (f2 == 33)
          o.in.push_back(rd_desc(s2));
        else if (f2 == 34)
          o.out.push_back(rd_desc(s2));
      }
      ops.push_back(std::move(o));
    }
}
static void parse(const std::string& b, std::vector<Op>& ops) {  // torchair serializes ModelDef (field 7 = graph)
  Rd r{(const uint8_t*)b.data(), (const uint8_t*)b.data() + b.size()};
  uint32_t f, w;
  uint64_t v;
  Rd s;
  while (r.next(f, w, v, s))
    if (f == 7 && w == 2) {
      rd_graph(s, ops);
      return;
    }
  rd_graph(Rd{(const uint8_t*)b.data(), (const uint8_t*)b.data() + b.size()}, ops);
}

struct NodeImpl {
  std::string type;
  std::vector<Desc> in, out;
};
class GNode {
 public:
  GNode();
  ~GNode() = default;
  graphStatus GetType(AscendString& t) const;
  size_t GetInputsSize() const;
  graphStatus GetInputDesc(const int32_t, TensorDesc&) const;
  graphStatus GetOutputDesc(const int32_t, TensorDesc&) const;
  std::shared_ptr<NodeImpl> impl_;
};
GNode::GNode() {}
graphStatus GNode::GetType(AscendString& t) const {
  t = AscendString(impl_->type.c_str());
  return 0;
}
static DataType p2g(int d) {
  static const int m[] = {28, 0, 1, 2, 4, 6, 7, 3, 9, 8, 10, 12, 11};
  return (DataType)(d < 13 ? m[d] : d < 28 ? d : d + 1);
}
static void setd(const Desc& d, TensorDesc& t) {
  t.SetShape(Shape(d.dims));
  t.SetOriginShape(Shape(d.dims));
  t.SetDataType(p2g(d.dt));
}
size_t GNode::GetInputsSize() const { return impl_->in.size(); }
graphStatus GNode::GetInputDesc(const int32_t i, TensorDesc& t) const {
  setd(impl_->in.at(i), t);
  return 0;
}
graphStatus GNode::GetOutputDesc(const int32_t i, TensorDesc& t) const {
  setd(impl_->out.at(i), t);
  return 0;
}
struct GraphImpl {
  std::string name, bytes;
  std::vector<Op> ops;
};
class Graph {
 public:
  explicit Graph(const char_t* n);
  Graph() = default;
  graphStatus SaveToFile(const char_t* f) const;
  graphStatus LoadFromSerializedModelArray(const void* p, size_t n);
  std::vector<GNode> GetAllNodes() const;
  std::vector<GNode> GetDirectNode() const;
  graphStatus CopyFrom(const Graph&);
  std::shared_ptr<GraphImpl> impl_;
};
Graph::Graph(const char_t* n) : impl_(std::make_shared<GraphImpl>()) { impl_->name = n; }
graphStatus Graph::SaveToFile(const char_t* f) const {
  FILE* fp = fopen(f, "wb");
  if (!fp) return 1;
  fwrite(impl_->bytes.data(), 1, impl_->bytes.size(), fp);
  fclose(fp);
  return 0;
}
graphStatus Graph::LoadFromSerializedModelArray(const void* p, size_t n) {
  impl_ = std::make_shared<GraphImpl>();
  impl_->bytes.assign((const char*)p, n);
  parse(impl_->bytes, impl_->ops);
  LOG("Graph::LoadFromSerializedModelArray %zu bytes, %zu ops", n, impl_->ops.size());
  return 0;
}
std::vector<GNode> Graph::GetAllNodes() const {
  std::vector<GNode> r;
  for (auto& o : impl_->ops) {
    GNode g;
    g.impl_ = std::make_shared<NodeImpl>();
    g.impl_->type = o.type;
    g.impl_->in = o.in;
    g.impl_->out = o.out;
    r.push_back(g);
  }
  return r;
}
std::vector<GNode> Graph::GetDirectNode() const { return GetAllNodes(); }
graphStatus Graph::CopyFrom(const Graph& g) {
  impl_ = g.impl_;
  return 0;
}

class OperatorImpl {
 public:
  std::string type;
};
class Operator {
 public:
  virtual ~Operator() = default;
  graphStatus UpdateInputDesc(const char_t* n, const TensorDesc& t);
  graphStatus GetAllIrAttrNamesAndTypes(std::map<AscendString, AscendString>& m) const;
  std::shared_ptr<OperatorImpl> operator_impl_{nullptr};
};
graphStatus Operator::UpdateInputDesc(const char_t*, const TensorDesc&) { return 0; }
graphStatus Operator::GetAllIrAttrNamesAndTypes(std::map<AscendString, AscendString>& m) const {
  auto found = operator_impl_ ? g_ir.find(operator_impl_->type) : g_ir.end();
  if (found == g_ir.end()) return 0;
  for (auto& attr : found->second.attr)
    m[AscendString(attr.first.c_str())] = AscendString(attr.second.c_str());
  return 0;
}
class OperatorFactory {
 public:
  static Operator CreateOperator(const char_t* const, const char_t* const);
  static bool IsExistOp(const char_t* const);
};
Operator OperatorFactory::CreateOperator(const char_t* const, const char_t* const type) {
  Operator op;
  op.operator_impl_ = std::make_shared<OperatorImpl>();
  op.operator_impl_->type = type;
  return op;
}
bool OperatorFactory::IsExistOp(const char_t* const) { return true; }

std::string GEGetErrorMsg() { return "[host_cann] GE error"; }
AscendString GEGetWarningMsgV2() { return AscendString(""); }
Status GEInitialize(const std::map<AscendString, AscendString>& o) {
  if (host_cann_debug())
    for (auto& k : o)
      LOG("GEInitialize %s=%s", k.first.GetString(), k.second.GetString());
  return 0;
}
Status GEFinalize() { return 0; }

class CompiledGraphSummary {
 public:
  class SummaryData;
  ~CompiledGraphSummary();
  bool IsStatic() const;
  Status GetConstMemorySize(size_t&) const;
  Status GetFeatureMemorySize(size_t&) const;
  Status GetFixedFeatureMemorySize(size_t&) const;
  Status GetFeatureMemoryBaseRefreshable(bool&) const;
  Status GetOutputShapes(std::vector<Shape>&) const;
  Status GetOutputDtypes(std::vector<DataType>&) const;
  std::shared_ptr<SummaryData> data_{nullptr};
};
class CompiledGraphSummary::SummaryData {
 public:
  bool st = true;
  std::vector<Shape> shapes;
  std::vector<DataType> dts;
};
CompiledGraphSummary::~CompiledGraphSummary() = default;
bool CompiledGraphSummary::IsStatic() const { return data_->st; }
Status CompiledGraphSummary::GetConstMemorySize(size_t& s) const {
  s = 512;
  return 0;
}
Status CompiledGraphSummary::GetFeatureMemorySize(size_t& s) const {
  s = 1024;
  return 0;
}
Status CompiledGraphSummary::GetFixedFeatureMemorySize(size_t& s) const {
  s = 512;
  return 0;
}
Status CompiledGraphSummary::GetFeatureMemoryBaseRefreshable(bool& v) const {
  v = false;
  return 0;
}
Status CompiledGraphSummary::GetOutputShapes(std::vector<Shape>& s) const {
  s = data_->shapes;
  return 0;
}
Status CompiledGraphSummary::GetOutputDtypes(std::vector<DataType>& d) const {
  d = data_->dts;
  return 0;
}

class Allocator;
class Session {
 public:
  explicit Session(const std::map<AscendString, AscendString>&);
  ~Session();
  Status AddGraph(uint32_t, const Graph&, const std::map<AscendString, AscendString>&);
  Status RemoveGraph(uint32_t);
  Status CompileGraph(uint32_t);
  std::shared_ptr<CompiledGraphSummary> GetCompiledGraphSummary(uint32_t);
  Status RunGraph(uint32_t, const std::vector<Tensor>&, std::vector<Tensor>&);
  Status RunGraphWithStreamAsync(uint32_t, void*, const std::vector<Tensor>&, std::vector<Tensor>&);
  Status RegisterExternalAllocator(const void* const, std::shared_ptr<Allocator>) const;
  Status SetGraphConstMemoryBase(uint32_t, const void* const, size_t);
  Status UpdateGraphFeatureMemoryBase(uint32_t, const void* const, size_t);
  Status SetGraphFixedFeatureMemoryBase(uint32_t, const void* const, size_t);
  Status UpdateGraphRefreshableFeatureMemoryBase(uint32_t, const void* const, size_t);
  uint64_t sessionId_{0};
};
static std::map<uint32_t, std::shared_ptr<CompiledGraphSummary::SummaryData>> g_spec;
static std::mutex g_mu;
Session::Session(const std::map<AscendString, AscendString>&) { LOG("Session created"); }
Session::~Session() { LOG("Session destroyed"); }
Status Session::AddGraph(uint32_t id, const Graph& g, const std::map<AscendString, AscendString>& opt) {
  auto s = std::make_shared<CompiledGraphSummary::SummaryData>();
  for (auto& o : g.impl_->ops) {
    if (o.type == "Data" || o.type == "RefData")
      for (auto& d : o.out)
        for (auto x : d.dims)
          if (x < 0) s->st = false;
    if (o.type == "NetOutput")
      for (auto& d : o.in) {
        s->shapes.emplace_back(d.dims);
        s->dts.push_back(p2g(d.dt));
      }
  }
  {
    std::lock_guard<std::mutex> l(g_mu);
    g_spec[id] = s;
  }
  std::string os;
  for (auto& x : opt) {
    os += x.first.GetString();
    os += "=";
    os += x.second.GetString();
    os += "\n";
  }
  LOG("Session::AddGraph %u ops=%zu outs=%zu static=%d", id, g.impl_->ops.size(), s->shapes.size(), (int)s->st);
  return g_add ? g_add(id, g.impl_->bytes.data(), g.impl_->bytes.size(), os.c_str()) : 0;
}
Status Session::RemoveGraph(uint32_t) { return 0; }
Status Session::CompileGraph(uint32_t id) {
  LOG("Session::CompileGraph %u", id);
  return 0;
}
std::shared_ptr<CompiledGraphSummary> Session::GetCompiledGraphSummary(uint32_t id) {
  auto r = std::make_shared<CompiledGraphSummary>();
  std::lock_guard<std::mutex> l(g_mu);
  r->data_ = g_spec[id];
  return r;
}
static void describe(const Tensor& t, HostTensor& f) {
  f.dtype = t.impl->desc.dt;
  f.ndim = t.impl->desc.shape.size();
  for (int i = 0; i < f.ndim && i < 16; i++)
    f.dims[i] = t.impl->desc.shape[i];
  f.data = t.impl->data;
  f.nbytes = t.impl->size;
  f.on_device = t.impl->desc.p;
}
static Status run(uint32_t id, const std::vector<Tensor>& in, std::vector<Tensor>& out) {
  std::shared_ptr<CompiledGraphSummary::SummaryData> s;
  {
    std::lock_guard<std::mutex> l(g_mu);
    s = g_spec[id];
  }
  LOG("RunGraph %u in=%zu out=%zu/%zu", id, in.size(), out.size(), s->dts.size());
  bool fresh = out.empty();
  if (fresh) out.resize(s->dts.size());
  std::vector<HostTensor> fi(in.size() + 1), fo(out.size() + 1);
  for (size_t i = 0; i < in.size(); i++)
    describe(in[i], fi[i]);
  for (size_t i = 0; i < out.size(); i++)
    describe(out[i], fo[i]);
  if (!g_run) {
    fprintf(stderr, "[host_cann] no interpreter is installed: call host_cann.install()\n");
    return 1343225857u;
  }
  if (g_run(id, in.size(), fi.data(), out.size(), fo.data())) return 1343225857u;
  for (size_t i = 0; i < out.size(); i++)
    if (!out[i].impl->data) {  // GE-allocated output (callback used host_cann_alloc)
      TensorDescImpl& d = out[i].impl->desc;
      d.dt = (DataType)fo[i].dtype;
      d.shape.assign(fo[i].dims, fo[i].dims + fo[i].ndim);
      d.oshape = d.shape;
      d.p = fresh ? kHost : kDevice;
      out[i].ResetData((uint8_t*)fo[i].data, fo[i].nbytes, [](uint8_t* p) { free(p); });
    }
  return 0;
}
Status Session::RunGraph(uint32_t id, const std::vector<Tensor>& i, std::vector<Tensor>& o) { return run(id, i, o); }
Status Session::RunGraphWithStreamAsync(uint32_t id, void*, const std::vector<Tensor>& i, std::vector<Tensor>& o) {
  return run(id, i, o);
}
Status Session::RegisterExternalAllocator(const void* const, std::shared_ptr<Allocator>) const { return 0; }
Status Session::SetGraphConstMemoryBase(uint32_t, const void* const, size_t) { return 0; }
Status Session::UpdateGraphFeatureMemoryBase(uint32_t, const void* const, size_t) { return 0; }
Status Session::SetGraphFixedFeatureMemoryBase(uint32_t, const void* const, size_t) { return 0; }
Status Session::UpdateGraphRefreshableFeatureMemoryBase(uint32_t, const void* const, size_t) { return 0; }
}  // namespace ge

// ---- IR registry behind torchair.ge.custom_op / auto-generated converters
extern "C" {
static std::map<std::string, host_cann_execute> g_custom_ops;
int host_cann_register_custom_op(const char* op, host_cann_execute execute) {
  g_custom_ops[op] = execute;
  return 0;
}
int host_cann_run_custom_op(const char* op, int n, const HostTensor* inputs, HostTensor* made,
                            host_cann_allocate allocate) {
  auto found = g_custom_ops.find(op);
  return found == g_custom_ops.end() ? -1 : found->second(op, n, inputs, made, allocate);
}
void host_cann_register_ir(const char* op, const char* spec) {
  Ir ir;
  char kind[16], name[128], ty[64];
  const char* p = spec;
  int n;
  while (sscanf(p, " %15s %127s %63s%n", kind, name, ty, &n) == 3) {
    p += n;
    auto& v = kind[0] == 'i' ? ir.in : kind[0] == 'o' ? ir.out : ir.attr;
    v.emplace_back(name, ty);
  }
  g_ir[op] = ir;
}
uint32_t GetRegisteredIrDef(const char* op, std::vector<std::pair<ge::AscendString, ge::AscendString>>& i,
                            std::vector<std::pair<ge::AscendString, ge::AscendString>>& o,
                            std::vector<std::pair<ge::AscendString, ge::AscendString>>& a) {
  auto it = g_ir.find(op);
  LOG("GetRegisteredIrDef %s -> %s", op, it == g_ir.end() ? "unknown" : "ok");
  if (it == g_ir.end()) return 1343225857u;
  for (auto& x : it->second.in)
    i.emplace_back(ge::AscendString(x.first.c_str()), ge::AscendString(x.second.c_str()));
  for (auto& x : it->second.out)
    o.emplace_back(ge::AscendString(x.first.c_str()), ge::AscendString(x.second.c_str()));
  for (auto& x : it->second.attr)
    a.emplace_back(ge::AscendString(x.first.c_str()), ge::AscendString(x.second.c_str()));
  return 0;
}
}
