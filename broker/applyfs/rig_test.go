package applyfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/agents/wire"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/sources"
	"spectrum-os.org/broker/vmm/shim"
	"spectrum-os.org/broker/vmm/vmmtest"
)

// TestMain lets the test binary be a shim, its launchers, and their VMM.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "serve", "launch":
			os.Exit(shim.Main())
		case "--api-socket":
			os.Exit(vmmtest.Main(os.Args[1:]))
		}
	}
	os.Exit(m.Run())
}

// world is a [Host] with one partition and one VM that runs.
type world struct {
	t         *testing.T
	vm        uuid.UUID
	partition sources.Partition
	// instance is the VM's present run.
	instance func() string
	seams    seams

	mu      sync.Mutex
	shim    Shim // nil: the VM does not run
	gone    bool // the partition is
	agent   Agent
	noAgent error
	asked   bool // for the agent
}

// newWorld is a world whose VM's shim is still to be set. Its partition has the
// directory docs with the file docs/one, and what else paths may lead to.
func newWorld(t *testing.T) *world {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"files/docs", "files/other", "svc/policy"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"files/docs/one", "svc/policy/p.rego"} {
		if err := os.WriteFile(filepath.Join(root, file), []byte("contents"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{
		t: t, vm: uuid.New(), agent: &goodAgent{},
		partition: sources.Partition{ID: uuid.New(), Dir: sources.HostPath(root), OwnerUID: 1234, OwnerGID: 1235, Writable: true},
	}
	return w
}

// fake gives the world's VM a fake shim.
func (w *world) fake() *fakeShim {
	s := newFakeShim(w.vm)
	w.t.Cleanup(s.close)
	w.instance = s.run
	w.set(s)
	return s
}

func (w *world) set(s Shim) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.shim = s
}

// Shim implements [Host].
func (w *world) Shim(vm uuid.UUID) (Shim, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if vm != w.vm || w.shim == nil {
		return nil, false
	}
	return seamShim{w.shim, &w.seams}, true
}

// Agent implements [Host].
func (w *world) Agent(_ context.Context, vm uuid.UUID) (Agent, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = true
	switch {
	case vm != w.vm:
		return nil, errors.New("no such VM")
	case w.noAgent != nil:
		return nil, w.noAgent
	}
	return seamAgent{w.agent, &w.seams}, nil
}

// Partition implements [Host].
func (w *world) Partition(id uuid.UUID) (sources.Partition, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.partition, id == w.partition.ID && !w.gone
}

func (w *world) path(names ...string) string {
	return filepath.Join(append([]string{string(w.partition.Dir), "files"}, names...)...)
}

func (w *world) capability(path string, rights ...string) capabilities.Capability {
	w.t.Helper()
	rel, err := capabilities.ParseRelPath(path)
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := capabilities.NewFS(w.partition.ID, rel, capabilities.NewRights(rights...))
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// object is one for the VM's present run, the same for every call with a name.
func (w *world) object(name string, generation uint64, c capabilities.Capability) reconcile.Object {
	return reconcile.Object{
		ID: objectID(uuid.NewSHA1(w.vm, []byte(name))), Kind: Kind, VM: w.vm, Instance: w.instance(),
		Generation: generation, Capability: c, Label: name,
	}
}

// held are this process's descriptors of what is in the partition.
func (w *world) held() []string {
	w.t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		w.t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && strings.HasPrefix(to, string(w.partition.Dir)) {
			out = append(out, to)
		}
	}
	return out
}

// seams are places in an application or a withdrawal at which a test can step
// in, once each.
type seams struct {
	mu sync.Mutex
	at map[string]func()
}

// The places.
const (
	beforePut    = "1 before it is shared"
	whilePut     = "2 while it is being shared"
	afterPut     = "3 between share and mount"
	whileMount   = "4 while the agent mounts it"
	beforeRemove = "1 before the shim is told"
	whileRemove  = "2 while the guest lets go"
)

func (s *seams) arm(place string, do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at == nil {
		s.at = map[string]func(){}
	}
	s.at[place] = do
}

func (s *seams) take(place string) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	do := s.at[place]
	delete(s.at, place)
	return do
}

func (s *seams) reach(place string) (armed bool) {
	do := s.take(place)
	if do != nil {
		do()
	}
	return do != nil
}

// seamShim is a shim with a test's seams around its calls.
type seamShim struct {
	Shim
	seams *seams
}

func (s seamShim) Put(ctx context.Context, o shim.Object, f *os.File) (shim.ObjectState, error) {
	s.seams.reach(beforePut)
	s.when(whilePut, func(objects map[string]string) bool { return objects[o.ID] != "" })
	st, err := s.Shim.Put(ctx, o, f)
	s.seams.reach(afterPut)
	return st, err
}

func (s seamShim) Remove(ctx context.Context, id string, generation uint64) (shim.ObjectState, error) {
	s.seams.reach(beforeRemove)
	s.when(whileRemove, func(objects map[string]string) bool { return objects[id] != shim.Attached })
	return s.Shim.Remove(ctx, id, generation)
}

// when reaches a place once the shim's objects are as is says.
func (s seamShim) when(place string, is func(phases map[string]string) bool) {
	do := s.seams.take(place)
	if do == nil {
		return
	}
	go func() {
		for {
			state, err := s.State(context.Background())
			phases := map[string]string{}
			for _, o := range state.Objects {
				phases[o.ID] = o.Phase
			}
			if err != nil || is(phases) {
				do()
				return
			}
		}
	}()
}

// seamAgent is an agent that falls silent where a test steps in.
type seamAgent struct {
	Agent
	seams *seams
}

func (a seamAgent) Mount(ctx context.Context, r wire.MountRequest) (wire.MountReply, error) {
	if a.seams.reach(whileMount) {
		<-ctx.Done()
		return wire.MountReply{}, ctx.Err()
	}
	return a.Agent.Mount(ctx, r)
}

// goodAgent mounts what it is told, and refuses what a real one refuses.
type goodAgent struct {
	mu       sync.Mutex
	requests []wire.MountRequest
	// fails are the errors of its next answers.
	fails []error
}

func (a *goodAgent) Mount(_ context.Context, r wire.MountRequest) (wire.MountReply, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests = append(a.requests, r)
	if len(a.fails) > 0 {
		err := a.fails[0]
		a.fails = a.fails[1:]
		return wire.MountReply{}, err
	}
	if err := r.Check(); err != nil {
		return wire.MountReply{}, fmt.Errorf("a request that no agent takes: %w", err)
	}
	return wire.MountReply{Path: wire.MountPath(r.Label)}, nil
}

func (a *goodAgent) Unmount(context.Context, string) error { return nil }

func (a *goodAgent) seen() []wire.MountRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]wire.MountRequest(nil), a.requests...)
}
