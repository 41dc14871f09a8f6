package broker

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

// One row ends a subtree of ten thousand, at once.
func TestRevokingASubtreeIsOneRow(t *testing.T) {
	const nodes = 10_000
	g := newGranting(t, allowsAll, allowsAll)
	root := g.granted(mail1, "/docs")
	// From here on nobody takes anything from a VM, and nobody records that.
	g.reconciler.Close()
	var all []uuid.UUID
	_, err := g.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		for n := range nodes {
			parent := root.ID
			if n > 0 {
				parent = all[(n-1)/3]
			}
			id := uuid.New()
			if err := tx.Append(ledger.NewGrant(brokerActor, id, uuid.New(), homeID, ledger.GrantRecord{Capability: root.Capability, Parent: parent, Persist: true})); err != nil {
				return err
			}
			all = append(all, id)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	head, _ := g.ledger.Head()
	uid := uint32(1000)
	person := ledger.Actor{Kind: ledger.ActorPerson, UID: &uid}
	done, err := g.revoke(t.Context(), person, func(s *ledger.State) []uuid.UUID { return append([]uuid.UUID{all[7], root.ID, root.ID}, all[:100]...) }, "lent", false)
	if err != nil || len(done.revoking)+len(done.revoked) != nodes+1 {
		t.Fatalf("%d and %d, %v", len(done.revoked), len(done.revoking), err)
	}
	now := g.o.Clock.Now()
	g.ledger.View(func(s *ledger.State) {
		for _, id := range all {
			if s.Live(id, now) == nil {
				t.Fatalf("grant %s lives on", id)
			}
		}
	})
	on, err := g.ledger.Events(head, ledger.EventFilter{}, 0)
	if err != nil || len(on) != 1 || on[0].Type != ledger.GrantRevoking || on[0].Grant != root.ID || on[0].Actor.Kind != ledger.ActorPerson {
		t.Errorf("the revocation of %d grants took %d rows, %v", nodes+1, len(on), err)
	}
	// It is shown as what it is before its own end is on record.
	shown := g.apiGrants(t.Context(), []ledger.Grant{{ID: all[nodes-1], Holder: mail2, Capability: root.Capability, State: ledger.Active}})
	if shown[0].State != api.GrantRevoking || !strings.Contains(shown[0].Reason, "its ancestor ") {
		t.Errorf("%s: %s", shown[0].State, shown[0].Reason)
	}
}

// All who hold something of a subtree are woken, also where nobody looks at them
// otherwise; nothing of it stays in the world, whatever ended it.
func TestWhateverEndsTheRootCutsTheRest(t *testing.T) {
	for name, end := range map[string]func(g *granting, root ledger.Grant){
		"a revocation": func(g *granting, root ledger.Grant) {
			if _, err := g.revoke(context.Background(), brokerActor, only(root.ID), "test", false); err != nil {
				g.t.Error(err)
			}
		},
		"the end of its run": func(g *granting, root ledger.Grant) {
			u := g.unit(root.Holder)
			g.vanish(root.Holder)
			g.endRun(u, brokerActor, "run-1", "the VM ended")
		},
		"an end of its run that was recorded late": func(g *granting, root ledger.Grant) {
			g.vanish(root.Holder)
			if err := g.sweep(context.Background()); err != nil {
				g.t.Error(err)
			}
		},
		"the loss of its object": func(g *granting, root ledger.Grant) {
			g.things.mu.Lock()
			delete(g.things.objects, "o-"+root.ID.String())
			g.things.mu.Unlock()
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newDelegating(t, allowsAll, allowsAll)
			root := g.granted(mail1, "/docs")
			child := g.passedOn(root, mail2, "/docs/a")
			leaf := g.passedOn(child, mail3, "/docs/a/b", persists)
			other := g.granted(mail2, "/other")
			end(g, root)
			for _, id := range []uuid.UUID{root.ID, child.ID, leaf.ID} {
				g.awaitState(id, ledger.Revoked)
				if g.things.has(id) {
					t.Errorf("grant %s still gives access", id)
				}
			}
			if got := g.look(leaf.ID); !strings.Contains(got.Reason, root.ID.String()) && !strings.Contains(got.Reason, child.ID.String()) {
				t.Errorf("it does not say what it died with: %q", got.Reason)
			}
			if got := g.look(other.ID); got.State != ledger.Active {
				t.Errorf("another grant of the VM is %s", got.State)
			}
		})
	}
}

// A dry run tells the whole subtree, in the order of the tree, and leaves no
// trace.
func TestDryRun(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	root := g.granted(mail1, "/docs")
	child := g.passedOn(root, mail3, "/docs/a")
	g.granted(mail2, "/other")
	head, _ := g.ledger.Head()
	res, err := g.Revoke(t.Context(), api.Caller{Kind: api.CallerPerson}, api.RevokeRequest{VM: mail1.String(), DryRun: true, Wait: true})
	if err != nil || !res.DryRun || len(res.Revoked)+len(res.Revoking) != 0 || len(res.WouldRevoke) != 2 ||
		res.WouldRevoke[0].ID != root.ID || res.WouldRevoke[1].ID != child.ID {
		t.Errorf("%+v, %v", res, err)
	}
	if now, _ := g.ledger.Head(); now != head {
		t.Errorf("%d events were recorded", now-head)
	}
	if !g.things.has(root.ID) || !g.things.has(child.ID) {
		t.Error("access was cut")
	}
	// What it says is what happens.
	done, err := g.Revoke(t.Context(), api.Caller{Kind: api.CallerPerson}, api.RevokeRequest{VM: mail1.String(), Wait: true})
	if err != nil || len(done.Revoked) != 2 {
		t.Errorf("%+v, %v", done, err)
	}
}

// Five uses that are delegated to many are five, whoever is first.
func TestBudgetAmongManyHolders(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	root := g.granted(mail1, "/docs", func(r *request) {
		five := 6 // one is its own
		r.limits.MaxUses = &five
	})
	var wg sync.WaitGroup
	var mu sync.Mutex
	var made []uuid.UUID
	for n := range 100 {
		vm := []uuid.UUID{mail2, mail3}[n%2]
		r := g.asks(vm, "/x", func(r *request) {
			r.parent = &root
			c, err := g.kinds.Parse(fmt.Sprintf("fs:ro:%s:/docs/%d", workID, n), nil)
			if err != nil {
				t.Error(err)
			}
			r.capability = c
		})
		wg.Go(func() {
			x, err := g.grant(context.Background(), r)
			if err != nil {
				if api.CodeOf(err) != api.CodeDenied && api.CodeOf(err) != api.CodeNoSlots {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			made = append(made, x.ID)
		})
	}
	wg.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	active := 0
	for _, id := range made {
		got, err := g.await(ctx, id, func(x ledger.Grant) bool { return x.State != ledger.Pending })
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case got.State == ledger.Active:
			active++
		case got.State != ledger.Failed || !strings.Contains(got.Reason, root.ID.String()+": used up"):
			t.Errorf("grant %s is %s: %s", id, got.State, got.Reason)
		}
	}
	if got := g.look(root.ID); active != 5 || got.Uses != 6 {
		t.Errorf("%d of a budget of 5 are there, %d uses are on record", active, got.Uses)
	}
}

// A grant that persists has one use for each run. When none is left it is
// revoked before the run that would be one more gets anything.
func TestUsesOfAGrantThatPersists(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	two := 2
	got := g.granted(mail1, "/docs", persists, func(r *request) { r.limits.MaxUses = &two })
	again := func(run string) {
		u := g.unit(mail1)
		g.things.mu.Lock()
		delete(g.things.objects, "o-"+got.ID.String()) // with its VM
		g.things.mu.Unlock()
		g.vanish(mail1)
		g.endRun(u, brokerActor, u.instance(), "the VM ended")
		g.run(mail1, run)
		g.reconciler.Wake(mail1)
	}
	again("run-2")
	for end := time.Now().Add(20 * time.Second); !g.things.has(got.ID); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("its second use was not given")
		}
	}
	// The same run is not charged twice, however often it is looked at.
	g.reconciler.Wake(mail1)
	time.Sleep(50 * time.Millisecond)
	if now := g.look(got.ID); now.Uses != 2 || now.State != ledger.Active {
		t.Fatalf("%s after %d uses", now.State, now.Uses)
	}
	again("run-3")
	now := g.awaitState(got.ID, ledger.Revoked)
	if !strings.Contains(now.Reason, got.ID.String()+": used up") || now.Uses != 2 || g.things.has(got.ID) {
		t.Errorf("%d uses, because %q", now.Uses, now.Reason)
	}
}
