package broker

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
)

// model is all that a broker promises, as far as grants are concerned. Its time
// is the latest that any clock has shown.
type model struct {
	now    time.Duration
	grants []*held
	runs   map[uuid.UUID]string // of the VMs that run
	absent map[uuid.UUID]bool   // partitions that are not there
}

// held is a grant in the model.
type held struct {
	id, holder, partition uuid.UUID
	parent                *held
	path                  string
	persist, ended        bool
	ends                  time.Duration // 0: never
}

// live: neither it nor what it derives from was ended or has run out.
func (m *model) live(g *held) bool {
	for ; g != nil; g = g.parent {
		if g.ended || g.ends != 0 && g.ends <= m.now {
			return false
		}
	}
	return true
}

// exists: what is live is in the world while its VM runs, and nothing else is.
func (m *model) exists(g *held) bool { return m.live(g) && m.runs[g.holder] != "" }

// mayDerive: no more than its parent gives, from one that is live.
func (m *model) mayDerive(parent *held, partition uuid.UUID, path string) bool {
	within := parent == nil || partition == parent.partition && (path+"/" == parent.path+"/" || strings.HasPrefix(path+"/", strings.TrimSuffix(parent.path, "/")+"/"))
	return within && (parent == nil || m.live(parent))
}

func (m *model) end(which func(*held) bool) {
	for _, g := range m.grants {
		g.ended = g.ended || which(g)
	}
}

// exit ends what is tied to the run.
func (m *model) exit(vm uuid.UUID) {
	delete(m.runs, vm)
	m.end(func(g *held) bool { return g.holder == vm && !g.persist })
}

// start of a broker: it notices which partitions are gone.
func (m *model) start() { m.end(func(g *held) bool { return m.absent[g.partition] }) }

// machine is a broker with its world beside its model.
type machine struct {
	*granting
	model
	rt      *rapid.T
	clock   *turned
	behind  bool // the wall clock is, so that it does not tell for how long the machine was off
	hurry   bool // the last step was not waited for
	started int  // runs of VMs
}

// turned is a clock that the machine turns. Each check has a new one; the
// broker keeps the pointer.
type turned struct{ *clock.Fake }

// anew is a broker that has just been installed: an empty ledger and an empty
// world. The policy workers stay.
func (m *machine) anew(dir string) {
	g := m.granting
	m.hold(false)
	g.reconciler.Close()
	if err := g.ledger.Close(); err != nil {
		m.rt.Fatal(err)
	}
	*m.clock = turned{clock.NewFake()}
	g.o.StateDir = dir
	g.things.mu.Lock()
	g.things.objects, g.things.barred = map[string]reconcile.Observed{}, map[string]uint64{}
	g.things.mu.Unlock()
	g.running = map[uuid.UUID]*unit{}
	g.open()
	m.mark()
	m.plug()
	for vm, partition := range map[uuid.UUID]uuid.UUID{mail1: workID, mail2: homeID} {
		m.put(ledger.Event{Type: ledger.VMBound, Actor: brokerActor, VM: vm, Partition: partition})
		m.boots(vm)
	}
}

// plug has the broker see the partitions that are there.
func (m *machine) plug() {
	inv := *m.inventory.Load()
	inv.partitions = map[uuid.UUID]sources.Partition{}
	for _, p := range []uuid.UUID{workID, homeID} {
		if !m.absent[p] {
			inv.partitions[p] = sources.Partition{ID: p}
		}
	}
	m.inventory.Store(&inv)
}

func (m *machine) put(e ledger.Event) {
	_, err := m.ledger.Update(context.Background(), func(tx *ledger.Tx) error { return tx.Append(e) })
	if err != nil {
		m.rt.Fatal(err)
	}
}

// mark is what a broker records of the time when it starts, and each minute.
func (m *machine) mark() {
	_, err := m.ledger.Update(context.Background(), func(tx *ledger.Tx) error {
		return tx.Append(ledger.NewMark(brokerActor, tx.Now()))
	})
	if err != nil {
		m.rt.Fatal(err)
	}
}

func (m *machine) vm() uuid.UUID {
	return rapid.SampledFrom([]uuid.UUID{mail1, mail2}).Draw(m.rt, "vm")
}

// pick is any grant there ever was, or nil.
func (m *machine) pick() *held {
	if len(m.grants) == 0 {
		return nil
	}
	return rapid.SampledFrom(m.grants).Draw(m.rt, "grant")
}

// ask asks for a grant, and holds the answer against the model.
func (m *machine) ask(holder uuid.UUID, parent *held) {
	g := &held{
		holder: holder, parent: parent, persist: rapid.IntRange(0, 3).Draw(m.rt, "persist") == 3,
		partition: rapid.SampledFrom([]uuid.UUID{workID, homeID}).Draw(m.rt, "partition"),
		path:      rapid.SampledFrom([]string{"/", "/a", "/a/b", "/a/b/c", "/ab"}).Draw(m.rt, "path"),
	}
	if parent != nil && rapid.IntRange(0, 3).Draw(m.rt, "within") > 0 {
		g.partition = parent.partition
		g.path = strings.TrimSuffix(parent.path, "/") + rapid.SampledFrom([]string{"", "/a", "/b/c"}).Draw(m.rt, "beneath")
		g.path = "/" + strings.TrimPrefix(g.path, "/")
	}
	c, err := m.kinds.Parse("fs:ro:"+g.partition.String()+":"+g.path, nil)
	if err != nil {
		m.rt.Fatal(err)
	}
	uid := uint32(1000)
	r := request{action: policy.ActionGrant, actor: ledger.Actor{Kind: ledger.ActorPerson, UID: &uid}, holder: holder, capability: c, persist: g.persist, narrower: true}
	if ttl := rapid.SampledFrom([]int64{0, 0, 0, 5, 30, 60}).Draw(m.rt, "ttl"); ttl > 0 {
		r.ttl, g.ends = &ttl, m.now+time.Duration(ttl)*time.Second
	}
	if parent != nil {
		from := m.look(parent.id)
		r.parent = &from
		if parent.ends != 0 && (g.ends == 0 || parent.ends < g.ends) {
			g.ends = parent.ends
		}
	}
	may := m.mayDerive(parent, g.partition, g.path) && (g.persist || m.runs[holder] != "")
	made, err := m.grant(context.Background(), r)
	if (err == nil) != may {
		m.rt.Fatalf("%s for %s from %+v: %v, the model says %v", c, holder, parent, err, may)
	}
	if err == nil {
		g.id = made.ID
		m.grants = append(m.grants, g)
	}
}

// leave takes a VM, and all that it had, out of the world.
func (m *machine) leave(vm uuid.UUID) {
	m.things.mu.Lock()
	maps.DeleteFunc(m.things.objects, func(_ string, o reconcile.Observed) bool { return o.VM == vm })
	m.things.mu.Unlock()
	m.vanish(vm)
}

// boots starts a VM, unless it runs.
func (m *machine) boots(vm uuid.UUID) {
	if m.runs[vm] != "" {
		return
	}
	m.started++
	run := fmt.Sprintf("run-%d", m.started)
	if err := m.recordRun(context.Background(), ledger.VMStarted, brokerActor, vm, run, ""); err != nil {
		m.rt.Fatal(err)
	}
	m.unitOf(vm, run)
	m.runs[vm] = run
}

// hold has withdrawals wait for the guest, or no longer.
func (m *machine) hold(on bool) {
	m.things.mu.Lock()
	defer m.things.mu.Unlock()
	if m.things.stuck != nil {
		close(m.things.stuck)
		m.things.stuck = nil
	}
	if on {
		m.things.stuck = make(chan struct{})
	}
}

// crash drops all that the broker has in memory, and starts another one.
func (m *machine) crash(meanwhile func()) {
	m.reconciler.Close()
	if err := m.ledger.Close(); err != nil {
		m.rt.Fatal(err)
	}
	meanwhile()
	if r, err := ledger.Verify(context.Background(), m.o.StateDir); err != nil || r.Broken != nil {
		m.rt.Fatalf("the chain is not whole: %+v, %v", r.Broken, err)
	}
	m.labels, m.unrecorded = map[labelKey]bool{}, map[uuid.UUID]tombstone{}
	m.open()
	m.mark()
	m.plug()
	m.start()
	for _, f := range []func(context.Context) error{m.endStale, m.catchUp} {
		if err := f(context.Background()); err != nil {
			m.rt.Fatal(err)
		}
	}
}

// actions are what can happen. Each changes the machine and the model. Those that
// come first are drawn more often.
func (m *machine) actions() map[string]func(*rapid.T) {
	all := map[string]func(){
		"1 grant": func() { m.ask(m.vm(), nil) },
		"3 attenuate": func() {
			if p := m.pick(); p != nil {
				m.ask(p.holder, p)
			}
		},
		"2 delegate": func() {
			if p := m.pick(); p != nil {
				m.ask(m.vm(), p)
			}
		},
		"4 revoke": func() {
			if g := m.pick(); g != nil {
				if _, err := m.revoke(context.Background(), brokerActor, only(g.id), "asked to", false); err != nil {
					m.rt.Fatal(err)
				}
				g.ended = true
			}
		},
		"renew": func() {
			g := m.pick()
			if g == nil {
				return
			}
			ttl := rapid.Int64Range(1, 60).Draw(m.rt, "ttl")
			ends := m.now + time.Duration(ttl)*time.Second
			may := m.live(g) && g.ends != 0 && ends > g.ends && (g.parent == nil || g.parent.ends == 0 || ends <= g.parent.ends)
			if _, err := m.renew(context.Background(), brokerActor, m.look(g.id), &ttl, false); (err == nil) != may {
				m.rt.Fatalf("renewal of %+v: %v, the model says %v", g, err, may)
			} else if err == nil {
				g.ends = ends
			}
		},
		"expire": func() {
			d := time.Duration(rapid.IntRange(1, 40).Draw(m.rt, "seconds")) * time.Second
			m.clock.Advance(d)
			m.now += d
		},
		"set the clock back": func() {
			m.clock.SetWall(m.clock.Now().Wall.Add(-time.Hour))
			m.behind = true
		},
		"5 a guest holds on, or lets go": func() { m.hold(m.things.stuck == nil) },
		"start a VM":                     func() { m.boots(m.vm()) },
		"a VM exits": func() {
			if vm := m.vm(); m.runs[vm] != "" {
				u := m.unit(vm)
				m.leave(vm)
				m.endRun(u, brokerActor, m.runs[vm], "it exited")
				m.exit(vm)
			}
		},
		"unplug or plug a partition": func() {
			p := rapid.SampledFrom([]uuid.UUID{workID, homeID}).Draw(m.rt, "partition")
			m.absent[p] = !m.absent[p] && rapid.Bool().Draw(m.rt, "unplug")
		},
		"crash and restart": func() {
			m.crash(func() {
				if vm := m.vm(); m.runs[vm] != "" && rapid.Bool().Draw(m.rt, "a VM exits meanwhile") {
					m.leave(vm)
					m.exit(vm)
				}
			})
		},
		"the machine reboots": func() {
			// The broker leaves a mark each minute.
			m.mark()
			m.crash(func() {
				for _, vm := range []uuid.UUID{mail1, mail2} {
					m.leave(vm)
					m.exit(vm)
				}
				off := time.Duration(rapid.IntRange(0, 20).Draw(m.rt, "off")) * time.Second
				m.clock.Reboot(uuid.NewString(), off)
				if m.behind = m.behind || rapid.Bool().Draw(m.rt, "back"); m.behind {
					m.clock.SetWall(m.clock.Now().Wall.Add(-time.Hour))
				} else {
					m.now += off
				}
			})
		},
	}
	out := map[string]func(*rapid.T){}
	for name, do := range all {
		out[name] = func(t *rapid.T) {
			m.rt = t
			do()
			m.hurry = rapid.IntRange(0, 3).Draw(t, "hurry") == 0
		}
	}
	out[""] = func(t *rapid.T) { m.rt = t; m.check() }
	return out
}

// check compares the machine with its model: at once whether each grant is in
// force, and, unless the next step comes before that, in the end what exists.
func (m *machine) check() {
	m.ledger.View(func(s *ledger.State) {
		for _, g := range m.grants {
			if err := m.reconciler.Live(s, g.id); (err == nil) != m.live(g) {
				m.rt.Fatalf("grant %s: %v, the model says that it is live: %v", g.id, err, m.live(g))
			}
		}
	})
	m.things.mu.Lock()
	for id := range m.things.objects {
		// Nobody takes it away while it is looked at.
		if g := m.look(uuid.MustParse(strings.TrimPrefix(id, "o-"))); g.State.Final() {
			m.things.mu.Unlock()
			m.rt.Fatalf("grant %s is %s, and gives access", g.ID, g.State)
		}
	}
	held := m.things.stuck != nil
	m.things.mu.Unlock()
	if m.hurry || held {
		return
	}
	var differs string
	same := func() bool { differs = m.differs(); return differs == "" }
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if settled := m.settled(); same() && settled {
			break
		}
		if time.Now().After(end) {
			m.rt.Fatalf("in the end: %s", differs)
		}
	}
	if !same() {
		m.rt.Fatalf("it had been as it should, and then: %s", differs)
	}
}

func (m *machine) settled() bool {
	for _, vm := range []uuid.UUID{mail1, mail2} {
		m.reconciler.Wake(vm)
		if ok, err := m.reconciler.Settled(context.Background(), vm); err != nil || !ok {
			return false
		}
	}
	return true
}

// differs says how the world, and what is on record, are not as the model says.
func (m *machine) differs() string {
	m.things.mu.Lock()
	there := slices.Sorted(maps.Keys(m.things.objects))
	m.things.mu.Unlock()
	var want []string
	for _, g := range m.grants {
		now := m.look(g.id)
		switch {
		case m.exists(g) && now.State != ledger.Active,
			!m.live(g) && !now.State.Final(),
			m.live(g) && now.State.Ended():
			return fmt.Sprintf("grant %s is %s (%s), and live: %v", g.id, now.State, now.Reason, m.live(g))
		}
		if m.exists(g) {
			want = append(want, "o-"+g.id.String())
		}
	}
	slices.Sort(want)
	if !slices.Equal(there, want) {
		return fmt.Sprintf("the world has %v, want %v", there, want)
	}
	return ""
}

// TestBrokerAgainstModel has anything happen to a broker in any order, and wants
// it to be what a model of some tens of lines says. More of it: -rapid.checks.
func TestBrokerAgainstModel(t *testing.T) {
	// Each check has dozens of steps, each of which is waited for.
	if checks := flag.Lookup("rapid.checks"); checks.Value.String() == checks.DefValue {
		_ = checks.Value.Set("40")
		defer func() { _ = checks.Value.Set(checks.DefValue) }()
	}
	c := &turned{clock.NewFake()}
	g := newGrantingAt(t, allowsAll, allowsAll, c)
	root, n := t.TempDir(), 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		m := &machine{granting: g, rt: rt, clock: c, model: model{runs: map[uuid.UUID]string{}, absent: map[uuid.UUID]bool{}}}
		m.anew(filepath.Join(root, fmt.Sprint(n)))
		rt.Repeat(m.actions())
		m.hurry = false
		m.hold(false)
		m.check()
	})
}
