package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/sources"
	"spectrum-os.org/broker/vmm/shim"
)

// What happens to a VM while policy thinks of a request for it.
func TestRunEndsWhilePolicyThinks(t *testing.T) {
	const over = "ended or restarted meanwhile"
	exited := func(g *granting) {
		g.vanish(mail1)
		g.append(ledger.Event{Type: ledger.VMExited, Actor: brokerActor, VM: mail1, Data: ledger.JSON(ledger.RunData{Instance: "run-1"})})
	}
	for name, c := range map[string]struct {
		change   []func(*request)
		meantime func(g *granting)
		refused  bool
	}{
		"nothing happens": {nil, func(*granting) {}, false},
		"it ends":         {nil, exited, true},
		"it ends, for a grant that persists": {
			[]func(*request){persists}, exited, false,
		},
		"it restarts": {nil, func(g *granting) {
			exited(g)
			g.run(mail1, "run-2")
		}, true},
		"it reboots": {nil, func(g *granting) {
			u := g.unit(mail1)
			if !g.rebooted(g.ctx, u, "run-1", shim.State{VM: mail1, Instance: "run-2", Phase: shim.Running}) {
				t.Error("the reboot is not recorded")
			}
		}, true},
		"a start replaces it that nobody saw end": {nil, func(g *granting) { g.run(mail1, "run-2") }, true},
		"another VM ends": {nil, func(g *granting) {
			g.vanish(mail2)
			g.append(ledger.Event{Type: ledger.VMExited, Actor: brokerActor, VM: mail2, Data: ledger.JSON(ledger.RunData{Instance: "run-1"})})
		}, false},
		"an end comes late that is an older run's": {nil, func(g *granting) {
			g.append(ledger.Event{Type: ledger.VMExited, Actor: brokerActor, VM: mail1, Data: ledger.JSON(ledger.RunData{Instance: "run-0"})})
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGranting(t, allowsAll, allowsAll)
			g.things.thinking = func() { c.meantime(g) }
			r := g.asks(mail1, "/docs", c.change...)
			if !c.refused {
				made, err := g.grant(t.Context(), r)
				if err != nil || made.State != ledger.Pending {
					t.Errorf("%s, %v", made.State, err)
				}
				return
			}
			g.refused(r, api.CodeConflict, over)
			if g.things.thinking != nil {
				t.Fatal("policy was not asked, so that nothing was refused after it")
			}
			// Its label is free again.
			g.run(mail1, "run-3")
			if got := g.granted(mail1, "/docs"); got.Label != "docs" || got.Instance != "run-3" {
				t.Errorf("the next one is %q in %s", got.Label, got.Instance)
			}
		})
	}
}

// A VM whose start is not on record is given nothing: nothing would end it.
func TestRunThatIsNotOnRecord(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	g.unitOf(mail1, "run-unrecorded")
	g.refused(g.asks(mail1, "/docs"), api.CodeConflict, "ended or restarted meanwhile")
}

// What a definition declared for a run is not asked for in the next one.
func TestRequestForAnEarlierRun(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	_, err := g.grant(t.Context(), g.asks(mail1, "/docs", func(r *request) { r.run = "run-0" }))
	if api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), "ended or restarted meanwhile") {
		t.Errorf("error %v", err)
	}
	if n := g.count(); n != 0 {
		t.Errorf("%d grants are on record", n)
	}
	if _, err := g.grant(t.Context(), g.asks(mail1, "/docs", func(r *request) { r.run = "run-1" })); err != nil {
		t.Errorf("for the present run: %v", err)
	}
}

func TestVMThatDoesNotRun(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	g.vanish(mail1)
	_, err := g.grant(t.Context(), g.asks(mail1, "/docs"))
	if api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), "does not run") {
		t.Errorf("error %v", err)
	}
	made, err := g.grant(t.Context(), g.asks(mail1, "/docs", persists))
	if err != nil || made.Instance != "" {
		t.Errorf("one that persists: in run %q, %v", made.Instance, err)
	}
}

// A parent that ends meanwhile gives nothing on.
func TestParentEndsWhilePolicyThinks(t *testing.T) {
	for name, end := range map[string]func(g *granting, parent ledger.Grant){
		"revoked": func(g *granting, parent ledger.Grant) {
			if _, err := g.revoke(context.Background(), brokerActor, only(parent.ID), "test", false); err != nil {
				t.Error(err)
			}
		},
		"revoked, and cut": func(g *granting, parent ledger.Grant) {
			if _, err := g.revoke(context.Background(), brokerActor, only(parent.ID), "test", true); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGranting(t, allowsAll, allowsAll)
			parent := g.granted(mail1, "/docs")
			g.things.thinking = func() { end(g, parent) }
			g.refused(g.asks(mail1, "/docs/a", func(r *request) { r.parent = &parent }), api.CodeDenied, "the parent is not in force")
		})
	}
}

// The end of a run takes its grants, and nobody else's.
func TestEndOfARun(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	tied := g.granted(mail1, "/a")
	derived := g.granted(mail1, "/a/b", func(r *request) { r.parent = &tied })
	persistent := g.granted(mail1, "/c", persists)
	// It was asked to persist, and does not outlive what it derives from.
	orphan := g.granted(mail1, "/a/d", persists, func(r *request) { r.parent = &tied })
	other := g.granted(mail2, "/a")

	u := g.unit(mail1)
	g.vanish(mail1)
	uid := uint32(1000)
	g.endRun(u, ledger.Actor{Kind: ledger.ActorPerson, UID: &uid}, "run-1", "the VM ended: stopped")

	for name, id := range map[string]uuid.UUID{"tied": tied.ID, "derived": derived.ID} {
		if got := g.awaitState(id, ledger.Revoked); got.Reason != "the VM ended: stopped" {
			t.Errorf("%s: revoked because %q", name, got.Reason)
		}
	}
	if got := g.awaitState(orphan.ID, ledger.Revoked); !strings.Contains(got.Reason, "its ancestor "+tied.ID.String()) {
		t.Errorf("what derives from it was revoked because %q", got.Reason)
	}
	for name, id := range map[string]uuid.UUID{"persistent": persistent.ID, "another VM's": other.ID} {
		if got := g.look(id); got.State != ledger.Active {
			t.Errorf("%s: it is %s (%s)", name, got.State, got.Reason)
		}
	}
	for _, id := range []uuid.UUID{tied.ID, derived.ID, orphan.ID} {
		if g.things.has(id) {
			t.Errorf("%s gives access although it is revoked", id)
		}
	}
	if g.strayed.Load() {
		t.Error("the end is held to be missing from the record")
	}
	g.ledger.View(func(s *ledger.State) {
		if run, on := s.Running(mail1); on {
			t.Errorf("run %s is still on record", run)
		}
	})
	on := g.events(ledger.VMExited)
	var d ledger.RunData
	if len(on) != 1 || on[0].VM != mail1 || on[0].Partition != workID || on[0].Actor.Kind != ledger.ActorPerson {
		t.Fatalf("on record are %d ends", len(on))
	}
	if err := json.Unmarshal(on[0].Data, &d); err != nil || d.Instance != "run-1" || d.Reason != "the VM ended: stopped" {
		t.Errorf("on record is %s, %v", on[0].Data, err)
	}
}

// While a reboot is being recorded the VM is given nothing; the run before is
// over before the next one begins.
func TestReboot(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	tied, persistent := g.granted(mail1, "/a"), g.granted(mail1, "/b", persists)
	u := g.unit(mail1)
	if !g.rebooted(g.ctx, u, "run-1", shim.State{VM: mail1, Instance: "run-2", Phase: shim.Running}) {
		t.Fatal("it is not recorded")
	}
	if got := g.awaitState(tied.ID, ledger.Revoked); got.Reason != "the VM rebooted" {
		t.Errorf("revoked because %q", got.Reason)
	}
	if got := g.look(persistent.ID); got.State != ledger.Active {
		t.Errorf("what persists is %s (%s)", got.State, got.Reason)
	}
	if run := g.usable()[mail1]; run != "run-2" {
		t.Errorf("the VM can be given something in run %q", run)
	}
	var kinds []ledger.EventType
	for _, e := range g.events(ledger.VMExited, ledger.VMStarted) {
		if e.VM == mail1 {
			kinds = append(kinds, e.Type)
		}
	}
	if fmt.Sprint(kinds) != fmt.Sprint([]ledger.EventType{ledger.VMStarted, ledger.VMExited, ledger.VMStarted}) {
		t.Errorf("on record are %v", kinds)
	}
}

// Until a reboot is on record the VM can be given nothing, and one that never
// gets there is none.
func TestRebootThatIsNotRecorded(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	u := g.unit(mail1)
	u.pause()
	if run, ok := g.usable()[mail1]; ok {
		t.Errorf("the VM can be given something in run %q", run)
	}
	if _, running := g.instances()[mail1]; !running {
		t.Error("the VM counts as ended")
	}
	ctx, cancel := context.WithCancel(g.ctx)
	cancel()
	if g.rebooted(ctx, newUnit(mail2, t.TempDir(), &shim.Client{}, shim.State{Instance: "run-1"}), "run-1", shim.State{Instance: "run-2"}) {
		t.Error("a reboot that nobody could record was taken for one that is")
	}
}

// The sweep makes up for ends that nobody could record.
func TestSweep(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	vanished, persistent := g.granted(mail1, "/a"), g.granted(mail1, "/b", persists)
	runs := g.granted(mail2, "/a")
	g.vanish(mail1)
	if err := g.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := g.awaitState(vanished.ID, ledger.Revoked); got.Reason != "the VM ended" {
		t.Errorf("revoked because %q", got.Reason)
	}
	if g.things.has(vanished.ID) {
		t.Error("it gives access although it is revoked")
	}
	for name, id := range map[string]uuid.UUID{"persistent": persistent.ID, "of a VM that runs": runs.ID} {
		if got := g.look(id); got.State != ledger.Active {
			t.Errorf("%s: it is %s (%s)", name, got.State, got.Reason)
		}
	}
	if on := g.events(ledger.VMExited); len(on) != 1 || on[0].VM != mail1 {
		t.Errorf("on record are %d ends", len(on))
	}
	// Swept twice is swept once.
	head, _ := g.ledger.Head()
	if err := g.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again, _ := g.ledger.Head(); again != head {
		t.Errorf("a second sweep recorded %d events", again-head)
	}
}

// A VM that is being started has no unit yet, and is not over.
func TestSweepSparesAStart(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	grant := g.granted(mail1, "/a")
	g.mu.Lock()
	g.running[mail1] = nil
	g.mu.Unlock()
	if err := g.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := g.look(grant.ID); got.State != ledger.Active || len(g.events(ledger.VMExited)) != 0 {
		t.Errorf("the grant is %s (%s), and %d ends are on record", got.State, got.Reason, len(g.events(ledger.VMExited)))
	}
}

// The end of a run was lost, and the next one is on record: what belonged to the
// lost one ends all the same.
func TestSweepAfterALostEnd(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	lost := g.granted(mail1, "/a")
	g.run(mail1, "run-2")
	now := g.granted(mail1, "/b")
	if err := g.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := g.awaitState(lost.ID, ledger.Revoked); got.Reason != "the VM ended" {
		t.Errorf("revoked because %q", got.Reason)
	}
	if got := g.look(now.ID); got.State != ledger.Active {
		t.Errorf("what belongs to the present run is %s (%s)", got.State, got.Reason)
	}
}

// keepTime sweeps when an end may be missing, without being told anything else.
func TestStrayedIsSweptByItself(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	grant := g.granted(mail1, "/a")
	g.vanish(mail1)
	g.strayed.Store(true)
	g.wg.Go(func() { g.keepTime(g.ctx) })
	g.awaitState(grant.ID, ledger.Revoked)
	if g.strayed.Load() {
		t.Error("it is swept for ever")
	}
}

// A broker that starts ends what the last one left and whose ground is gone.
func TestEndStale(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	gone, goneVM := uuid.New(), uuid.New()
	record := func(vm uuid.UUID, partition uuid.UUID, instance string, persist bool) uuid.UUID {
		t.Helper()
		c, err := g.kinds.Parse("fs:ro:"+partition.String()+":/"+uuid.NewString(), nil)
		if err != nil {
			t.Fatal(err)
		}
		id := uuid.New()
		g.append(ledger.NewGrant(brokerActor, id, vm, workID, ledger.GrantRecord{Capability: c, Instance: instance, Persist: persist, Label: id.String()}))
		return id
	}
	g.vanish(mail2)
	const noBroker, noDefinition = "the VM ended while no broker ran", "the definition of its VM is gone"
	noPartition := fmt.Sprintf("partition %s is not there", gone)
	grants := map[string]struct {
		id   uuid.UUID
		want string // empty: it stays
	}{
		"this run's":                      {record(mail1, workID, "run-1", false), ""},
		"another run's":                   {record(mail1, workID, "run-0", false), noBroker},
		"another run's, persistent":       {record(mail1, workID, "run-0", true), ""},
		"of no run, persistent":           {record(mail1, workID, "", true), ""},
		"of no run":                       {record(mail1, workID, "", false), noBroker},
		"a stopped VM's":                  {record(mail2, homeID, "run-1", false), noBroker},
		"a stopped VM's, persistent":      {record(mail2, homeID, "run-1", true), ""},
		"on a lost partition":             {record(mail1, gone, "run-1", false), noPartition},
		"on a lost partition, persistent": {record(mail1, gone, "run-1", true), noPartition},
		"a lost VM's, persistent":         {record(goneVM, workID, "run-1", true), noDefinition},
	}
	if err := g.endStale(t.Context()); err != nil {
		t.Fatal(err)
	}
	head, _ := g.ledger.Head()
	if err := g.endStale(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again, _ := g.ledger.Head(); again != head {
		t.Errorf("what is ended is ended again: %d events", again-head)
	}
	for name, c := range grants {
		got := g.look(c.id)
		if (got.State == ledger.Revoking) != (c.want != "") || got.Reason != c.want {
			t.Errorf("%s: it is %s because %q, want %q", name, got.State, got.Reason, c.want)
		}
	}
}

// A broker that starts records which runs ended and began without one.
func TestCatchUp(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	g.vanish(mail2)
	g.unitOf(mail1, "run-2")
	if err := g.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, e := range g.events(ledger.VMExited, ledger.VMStarted)[2:] {
		var d ledger.RunData
		if err := json.Unmarshal(e.Data, &d); err != nil {
			t.Fatal(err)
		}
		got[fmt.Sprint(e.VM == mail1, e.Type, d.Instance, d.Reason)] = true
	}
	for _, want := range []string{
		fmt.Sprint(true, ledger.VMExited, "run-1", "the VM ended while no broker ran"),
		fmt.Sprint(true, ledger.VMStarted, "run-2", "found running"),
		fmt.Sprint(false, ledger.VMExited, "run-1", "the VM ended while no broker ran"),
	} {
		if !got[want] {
			t.Errorf("%q is not on record", want)
		}
		delete(got, want)
	}
	if len(got) != 0 {
		t.Errorf("on record is also %v", got)
	}
}

// The definition of a VM is gone when its end is found to be missing.
func TestEndOfAVMWithoutADefinition(t *testing.T) {
	for name, mend := range map[string]func(*granting) error{
		"swept":     func(g *granting) error { return g.sweep(t.Context()) },
		"caught up": func(g *granting) error { return g.catchUp(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGranting(t, allowsAll, allowsAll)
			inv := *g.inv()
			inv.definitions = map[uuid.UUID]sources.Definition{mail2: inv.definitions[mail2]}
			g.inventory.Store(&inv)
			g.vanish(mail1)
			if err := mend(g); err != nil {
				t.Fatal(err)
			}
			if on := g.events(ledger.VMExited); len(on) != 1 || on[0].VM != mail1 {
				t.Errorf("on record are %d ends", len(on))
			}
		})
	}
}

// The ledger cannot be written when a VM ends: the end is held to be missing.
func TestEndThatIsNotRecorded(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	u := g.unit(mail1)
	if err := g.ledger.Close(); err != nil {
		t.Fatal(err)
	}
	g.endRun(u, brokerActor, "run-1", "the VM ended")
	if !g.strayed.Load() {
		t.Error("the end is taken to be on record")
	}
	if err := g.sweep(t.Context()); !errors.Is(err, ledger.ErrClosed) {
		t.Errorf("swept: %v, want %v", err, ledger.ErrClosed)
	}
	if _, err := g.grant(t.Context(), g.asks(mail1, "/docs")); api.CodeOf(err) != api.CodeUnavailable || !strings.Contains(err.Error(), "nothing is granted") {
		t.Errorf("granted: %v", err)
	}
}
