package e2e

import (
	"context"
	"flag"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
	"spectrum-os.org/broker/test/guest/execclient"
	"spectrum-os.org/broker/test/harness"
)

var (
	tools harness.Tools
	demo  string
	// armed are programs that were built with failpoints.
	armed     struct{ broker, shim string }
	killTimes int
	killSeed  uint64
)

func TestMain(m *testing.M) {
	tools.Register(flag.CommandLine)
	flag.StringVar(&demo, "demo", "", "the demo")
	flag.StringVar(&armed.broker, "armed-broker", "", "a broker that was built with failpoints")
	flag.StringVar(&armed.shim, "armed-shim", "", "a shim that was built with failpoints")
	flag.IntVar(&killTimes, "kill-times", 5, "how often TestKills kills the broker")
	flag.Uint64Var(&killSeed, "kill-seed", 0, "seed of TestKills; 0 takes one from the clock")
	flag.Parse()
	code := m.Run()
	os.Exit(code)
}

// needTools skips, loudly, where the flags do not say what to run.
func needTools(t testing.TB) {
	t.Helper()
	if err := tools.Missing(); err != nil {
		t.Skipf("SKIP needs a VMM and its images (test/README.md): %v", err)
	}
}

// openPolicy allows a VM every file of its own partition, and the person
// everything; other partitions get what is beneath /public.
const openPolicy = `package spectrum.grant

allow if {
	input.capability.kind == "fs"
	input.holder.partition == input.partition
}

allow if {
	input.capability.kind == "fs"
	input.capability.resource.partition == input.partition
	startswith(input.capability.resource.path, "/public")
}

deny contains "nobody gets the secrets" if {
	input.capability.resource.partition == input.partition
	startswith(input.capability.resource.path, "/secret")
}
`

const openHostPolicy = `package spectrum.grant

allow if input.requester.kind == "person"
`

const smallVM = "memory_mib = 192\nvcpus = 1\n"

// world is a desktop for one test: a broker that runs, partitions and VMs
// that the test adds. Its end is a test too: nothing may be left.
type world struct {
	*harness.Desktop
	t         *testing.T
	direct    *api.Client // without the proxy of validate
	stopProxy func()
}

// newWorld makes a desktop; the broker is started by start, once the test has
// added partitions and VMs.
func newWorld(t *testing.T) *world {
	t.Helper()
	needTools(t)
	// Not t.TempDir: the paths of sockets must be short.
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	d, err := harness.New(tools, dir)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Desktop: d, t: t, direct: d.Client, stopProxy: func() {}}
	t.Cleanup(func() { w.end() })
	w.must(d.HostPolicy("host.rego", openHostPolicy))
	return w
}

// sub is the same desktop for a subtest, which is the one to fail.
func (w *world) sub(t *testing.T) *world {
	return &world{Desktop: w.Desktop, t: t, direct: w.direct, stopProxy: func() {}}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// end closes the desktop and asserts that nothing is left and that the chain
// of the audit is whole.
func (w *world) end() {
	t := w.t
	w.stopProxy()
	if t.Failed() {
		if log, err := os.ReadFile(w.Dir + "/broker.log"); err == nil {
			t.Logf("the broker's log:\n%s", lastBytes(string(log), 12<<10))
		}
	}
	if err := w.Close(); err != nil {
		t.Errorf("the desktop did not close: %v", err)
	}
	if left := w.Leftovers(w.Stretched(10 * time.Second)); len(left) > 0 {
		t.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	checkChain(t, w.StateDir())
	if err := os.RemoveAll(w.Dir); err != nil {
		t.Error(err)
	}
}

func lastBytes(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// ctx is a context for one step of a test.
func (w *world) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), w.Stretched(d))
	w.t.Cleanup(cancel)
	return ctx
}

// partition adds a partition with the open policy.
func (w *world) partition(files map[string]string) harness.Partition {
	w.t.Helper()
	p, err := w.AddPartition(files, map[string]string{"grant.rego": openPolicy})
	w.must(err)
	return p
}

func (w *world) vm(p harness.Partition, alias, toml string) uuid.UUID {
	w.t.Helper()
	id, err := w.AddVM(p, alias, toml)
	w.must(err)
	return id
}

func (w *world) start() {
	w.t.Helper()
	w.must(w.StartBroker(w.ctx(60 * time.Second)))
	w.validate()
}

// validate puts a proxy in front of the broker that holds every request and
// every answer of the test against the committed OpenAPI document.
func (w *world) validate() {
	w.t.Helper()
	socket := w.Dir + "/checked.sock"
	if w.Client != w.direct {
		return // it outlives a broker, and leads to the next one
	}
	l, err := net.Listen("unix", socket)
	w.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- apitest.New(w.t, api.HostDocument).Proxy(ctx, l, w.Socket()) }()
	w.Client = api.NewClient(socket)
	w.stopProxy = func() {
		w.Client.Close()
		w.Client = w.direct
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
}

// boot starts VMs side by side and waits until commands run in each.
func (w *world) boot(vms ...uuid.UUID) []*guest {
	w.t.Helper()
	out := make([]*guest, len(vms))
	errs := make([]error, len(vms))
	var wg sync.WaitGroup
	for i, vm := range vms {
		wg.Go(func() {
			var c *execclient.Client
			c, errs[i] = w.Boot(w.ctx(3*time.Minute), vm)
			out[i] = &guest{w, vm, c}
		})
	}
	wg.Wait()
	for _, err := range errs {
		w.must(err)
	}
	return out
}

// guest is a VM that runs.
type guest struct {
	w  *world
	vm uuid.UUID
	*execclient.Client
}

// sh runs a line in the guest and returns what it printed, and its status.
func (g *guest) sh(line string) (string, int) {
	g.w.t.Helper()
	r, err := g.Run(g.w.ctx(time.Minute), "sh", "-c", line)
	if err != nil {
		g.w.t.Fatalf("guest: %s: %v", line, err)
	}
	return strings.TrimSpace(string(r.Stdout) + string(r.Stderr)), r.Exit
}

// fs spells a file capability.
func fs(rights string, p harness.Partition, path string) string {
	return "fs:" + rights + ":" + p.ID.String() + ":" + path
}

// grant asks for a capability as a person and waits until the guest has it.
func (w *world) grant(vm uuid.UUID, capability, label string) api.Grant {
	w.t.Helper()
	g, err := w.tryGrant(vm, capability, label)
	w.must(err)
	if g.State != api.GrantActive || g.Observed.State != "attached" {
		w.t.Fatalf("grant %s is %s and %s (%s)", g.ID, g.State, g.Observed.State, g.Reason)
	}
	return g
}

func (w *world) tryGrant(vm uuid.UUID, capability, label string) (api.Grant, error) {
	return w.Client.Grant(w.ctx(2*time.Minute), api.GrantRequest{VM: vm.String(), Capability: capability, Label: label, Wait: true})
}

// revoke takes grants back and asserts that access is cut.
func (w *world) revoke(ids ...uuid.UUID) api.RevokeResult {
	w.t.Helper()
	req := api.RevokeRequest{Wait: true}
	for _, id := range ids {
		req.IDs = append(req.IDs, id.String())
	}
	r, err := w.Client.Revoke(w.ctx(time.Minute), req)
	w.must(err)
	if len(r.Revoking) > 0 {
		w.t.Fatalf("%d grants are still revoking", len(r.Revoking))
	}
	return r
}

// eventually fails the test unless check is nil in time.
func (w *world) eventually(within time.Duration, check func() error) {
	w.t.Helper()
	var err error
	for end := time.Now().Add(w.Stretched(within)); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	w.t.Fatalf("not within %v: %v", w.Stretched(within), err)
}
