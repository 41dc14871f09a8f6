package kill

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/vmm/shim"
)

// compare holds what a broker that has just said to be ready tells, and what
// exists, against what was acknowledged, and against each other. What was not
// answered is known from then on.
func (w *world) compare() error {
	ctx, cancel := context.WithTimeout(context.Background(), w.Stretched(30*time.Second))
	defer cancel()
	w.stats.comparisons++
	s, err := w.look(ctx)
	if err != nil {
		return err
	}
	// At once: what was acknowledged.
	wrong := slices.Concat(w.wrongGrants(s), w.wrongNames(s), w.wrongKeys(s))
	for _, m := range w.machines {
		if text := m.wrong(s.vms[m.id]); text != "" {
			wrong = append(wrong, fmt.Sprintf("VM %s: %s", m.name, text))
		}
	}
	wrong = append(wrong, w.aliveAfterEnd(s)...)
	if err := w.verify(); err != nil {
		wrong = append(wrong, err.Error())
	}
	if len(wrong) > 0 {
		return problems(wrong)
	}
	// Within a moment, as leases end and definitions are requested meanwhile:
	// what is said is what is.
	for end := time.Now().Add(w.Stretched(5 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
		if s, err = w.look(ctx); err != nil {
			return err
		}
		if wrong = w.untrue(s); len(wrong) == 0 {
			break
		}
		if time.Now().After(end) {
			return problems(wrong)
		}
	}
	w.settle(s)
	return nil
}

func problems(wrong []string) error {
	slices.Sort(wrong)
	return fmt.Errorf("the broker, the world and what was acknowledged differ:\n  %s", strings.Join(wrong, "\n  "))
}

// sight is what the broker says and what exists, one after the other.
type sight struct {
	at      time.Time // after grants: what ended by then may have
	grants  []api.Grant
	vms     map[uuid.UUID]api.VM
	names   map[uuid.UUID]string
	objects map[uuid.UUID][]shim.ObjectState // of the VMs whose shim answers
	alive   []process
	keys    []api.Key
	// archived are the labels of grants that are in an archive only.
	archived map[string]bool
}

func (w *world) look(ctx context.Context) (sight, error) {
	s := sight{vms: map[uuid.UUID]api.VM{}, names: map[uuid.UUID]string{}, objects: map[uuid.UUID][]shim.ObjectState{}}
	var err error
	if s.grants, err = w.Client.ListGrants(ctx, api.GrantFilter{All: true}); err != nil {
		return s, err
	}
	s.at = time.Now()
	vms, err := w.Client.ListVMs(ctx)
	if err != nil {
		return s, err
	}
	for _, v := range vms {
		s.vms[v.ID] = v
	}
	names, err := w.Client.ListNames(ctx)
	if err != nil {
		return s, err
	}
	for _, n := range names {
		s.names[n.Partition] = n.Name
	}
	if s.keys, err = w.Client.ListKeys(ctx); err != nil {
		return s, err
	}
	if s.archived, err = w.inArchives(ctx, s.grants); err != nil {
		return s, err
	}
	for _, m := range w.machines {
		s.objects[m.id] = w.objects(ctx, m)
	}
	w.collect()
	s.alive = descendants()
	return s, nil
}

// objects is what the VM's shim has; none, where there is no shim.
func (w *world) objects(ctx context.Context, m *machine) []shim.ObjectState {
	c, err := shim.Dial(m.dir)
	if err != nil {
		return nil
	}
	defer c.Close()
	state, err := c.State(ctx)
	if err != nil {
		return nil
	}
	return state.Objects
}

// wrongGrants are those whose state is none that was acknowledged.
func (w *world) wrongGrants(s sight) (wrong []string) {
	found := map[string]api.Grant{}
	states := map[uuid.UUID]api.GrantState{}
	for _, g := range s.grants {
		states[g.ID] = g.State
		if g.Declared {
			continue
		}
		if other, twice := found[g.Label]; twice {
			wrong = append(wrong, fmt.Sprintf("grants %s and %s both came of one request, %s", other.ID, g.ID, g.Label))
		}
		found[g.Label] = g
	}
	for _, g := range s.grants {
		if g.Parent != nil && live(g.State) && !live(states[*g.Parent]) {
			wrong = append(wrong, fmt.Sprintf("grant %s is %s, and its parent %s is %s", g.Label, g.State, g.Parent, states[*g.Parent]))
		}
	}
	w.locked(func() {
		known := map[string]bool{}
		for _, g := range w.grants {
			known[g.label] = true
			f, exists := found[g.label]
			// A lease that was over before the broker started has ended by now.
			over := !g.expires.IsZero() && !g.later && g.expires.Before(w.begun)
			switch text := g.wrong(f.State, exists, s.archived[g.label], s.at); {
			case text != "":
				wrong = append(wrong, fmt.Sprintf("grant %s (%s): %s (%s)", g.label, f.ID, text, f.Reason))
			case over && live(f.State):
				wrong = append(wrong, fmt.Sprintf("grant %s (%s): its lease ended %v before the broker started, and it is %s", g.label, f.ID, w.begun.Sub(g.expires), f.State))
			case g.id != uuid.Nil && exists && g.id != f.ID:
				wrong = append(wrong, fmt.Sprintf("grant %s was acknowledged as %s, and is %s", g.label, g.id, f.ID))
			}
		}
		for label, f := range found {
			if !known[label] {
				wrong = append(wrong, fmt.Sprintf("nobody asked for grant %s (%s)", label, f.ID))
			}
		}
	})
	return wrong
}

func (w *world) wrongNames(s sight) (wrong []string) {
	for p, n := range w.names {
		if is := s.names[p]; is != n.is && (n.asked == "" || is != n.asked) {
			wrong = append(wrong, fmt.Sprintf("partition %s was named %q (and then asked to be %q), and is %q", p, n.is, n.asked, is))
		}
	}
	return wrong
}

// aliveAfterEnd is what still serves a grant whose end was acknowledged.
func (w *world) aliveAfterEnd(s sight) (wrong []string) {
	ended := map[string]*grant{}
	for _, g := range w.pick(func(g *grant) bool { return g.id != uuid.Nil && (g.ended || g.doomed) }) {
		ended["fs-"+g.id.String()] = g
	}
	for _, m := range w.machines {
		for _, o := range s.objects[m.id] {
			if g := ended[o.ID]; g != nil && o.Phase != shim.Gone {
				wrong = append(wrong, fmt.Sprintf("grant %s (%s) has ended, and VM %s has its share: %s, served by %v", g.label, g.id, m.name, o.Phase, o.PIDs))
			}
		}
	}
	return wrong
}

// untrue is where the broker and the world differ, and what nobody owns.
func (w *world) untrue(s sight) (wrong []string) {
	owners := map[int]string{w.BrokerPID(): "the broker"}
	want := map[uuid.UUID]map[string]bool{}
	for _, m := range w.machines {
		want[m.id] = map[string]bool{}
	}
	declaredLive := map[uuid.UUID]int{}
	for _, g := range s.grants {
		v := s.vms[g.Holder]
		running := runs(v)
		switch {
		case g.State == api.GrantRevoking, g.State == api.GrantPending && running:
			wrong = append(wrong, fmt.Sprintf("grant %s (%s) stays %s", g.Label, g.ID, g.State))
		case g.State == api.GrantActive && running:
			want[g.Holder]["fs-"+g.ID.String()] = true
		case live(g.State) && !g.Persist:
			wrong = append(wrong, fmt.Sprintf("grant %s (%s) is %s, and its VM does not run", g.Label, g.ID, g.State))
		}
		if g.Declared && live(g.State) {
			declaredLive[g.Holder]++
		}
	}
	for vm, n := range declaredLive {
		if n > 1 {
			wrong = append(wrong, fmt.Sprintf("what VM %s declares is granted %d times", vm, n))
		}
	}
	for _, m := range w.machines {
		v := s.vms[m.id]
		if runs(v) {
			owners[v.ShimPID], owners[v.PID] = "a shim", "a VMM"
		} else if v.State != api.VMStopped {
			wrong = append(wrong, fmt.Sprintf("VM %s stays %s", m.name, v.State))
		}
		have := map[string]bool{}
		for _, o := range s.objects[m.id] {
			for _, p := range o.PIDs {
				owners[p.PID] = "a share"
			}
			if o.Phase == shim.Gone {
				continue
			}
			have[o.ID] = true
			if !want[m.id][o.ID] || o.Phase != shim.Attached {
				wrong = append(wrong, fmt.Sprintf("VM %s has the share %s, %s, of no active grant", m.name, o.ID, o.Phase))
			}
		}
		for id := range want[m.id] {
			if !have[id] {
				wrong = append(wrong, fmt.Sprintf("VM %s lacks the share %s of an active grant", m.name, id))
			}
		}
		wrong = append(wrong, w.strayFiles(m, runs(v), have)...)
	}
	for _, p := range s.alive {
		worker := p.parent == w.BrokerPID() && strings.HasSuffix(p.command, " policy-worker")
		if owners[p.pid] == "" && !worker {
			wrong = append(wrong, "an orphan: "+describe([]process{p})[0])
		}
	}
	for _, mount := range w.Mounts() {
		wrong = append(wrong, "a mount is left: "+mount)
	}
	for _, c := range w.cgroups() {
		id, _ := uuid.Parse(strings.TrimPrefix(filepath.Base(c), "spectrum-vm-"))
		if !runs(s.vms[id]) {
			wrong = append(wrong, "a cgroup is left: "+c)
		}
	}
	return wrong
}

// strayFiles are sockets and directories that nothing owns.
func (w *world) strayFiles(m *machine, runs bool, shares map[string]bool) (wrong []string) {
	entries, err := os.ReadDir(m.dir)
	if !runs {
		if err == nil {
			wrong = append(wrong, fmt.Sprintf("VM %s does not run, and %s is left with %d entries", m.name, m.dir, len(entries)))
		}
		return wrong
	}
	sockets, _ := filepath.Glob(filepath.Join(m.dir, "fs", "*.sock"))
	for _, path := range sockets {
		if id := strings.TrimSuffix(filepath.Base(path), ".sock"); !shares[id] {
			wrong = append(wrong, "a socket is left: "+path)
		}
	}
	return wrong
}

// cgroups are those of this desktop's VMs.
func (w *world) cgroups() (out []string) {
	for _, m := range w.machines {
		_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() && d.Name() == "spectrum-vm-"+m.id.String() {
				out = append(out, path)
				return filepath.SkipDir
			}
			return nil
		})
	}
	return out
}

// verify holds the chain against itself and against every head that was seen.
func (w *world) verify() error {
	ctx, cancel := context.WithTimeout(context.Background(), w.Stretched(20*time.Second))
	defer cancel()
	r, err := ledger.Verify(ctx, w.StateDir(), w.anchors...)
	if err != nil {
		return fmt.Errorf("the ledger cannot be verified: %w", err)
	}
	if r.Broken != nil {
		return fmt.Errorf("the chain is broken: %w", r.Broken)
	}
	if r.Events > 0 {
		w.anchors = append(w.anchors, ledger.Anchor{Seq: r.Last, Hash: r.Head})
	}
	return nil
}

// settle takes over what the broker says where it was open.
func (w *world) settle(s sight) {
	found := map[string]api.Grant{}
	for _, g := range s.grants {
		found[g.Label] = g
	}
	w.locked(func() {
		w.grants = slices.DeleteFunc(w.grants, func(g *grant) bool {
			f, exists := found[g.label]
			switch {
			case !exists: // it was never recorded, or refused before it was
				return true
			case live(f.State):
				if !g.given {
					g.key = "" // nobody said when it was made
				}
				g.given, g.mayEnd, g.later, g.id = true, false, false, f.ID
				if f.Expires != nil {
					g.lease, g.expires = true, *f.Expires
				}
			default:
				g.ended = true
			}
			return false
		})
		for _, m := range w.machines {
			v := s.vms[m.id]
			m.on, m.maybe = runs(v), false
			m.run, m.shim = v.Instance, v.ShimPID
			m.armed = m.armed && m.on
			for _, g := range w.grants {
				if g.vm == m && m.armed {
					g.mayEnd = true
				}
			}
		}
		for p, n := range w.names {
			n.is, n.asked = s.names[p], ""
		}
		w.settleKeys(s.keys)
	})
}
