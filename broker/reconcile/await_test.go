package reconcile

import (
	"context"
	"errors"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/ledger"
)

// Who says that access is cut waits also for what somebody else takes back just
// now.
func TestAwaitCut(t *testing.T) {
	g := newRig(t)
	id := g.grant(nil)
	g.await(id, ledger.Active)
	release := make(chan struct{})
	g.p.mu.Lock()
	g.p.stuck = map[string]chan struct{}{"o-" + id.String(): release}
	g.p.mu.Unlock()
	g.append(change(ledger.GrantRevoking, id, "test"))
	ending := []ledger.Grant{g.await(id, ledger.Revoking)}
	soon, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := g.r.AwaitCut(soon, ending); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while the guest holds it: %v", err)
	}
	close(release)
	late, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := g.r.AwaitCut(late, ending); err != nil || g.p.count() != 0 {
		t.Errorf("%v, and %d objects are left", err, g.p.count())
	}
}

// Before it is known what exists nothing is said to be gone: a VM that is not
// adopted yet looks like one that has ended.
func TestNothingIsSaidBeforeTheWorldIsKnown(t *testing.T) {
	g := newRig(t)
	id := g.grant(nil)
	g.await(id, ledger.Active)
	g.r.Close()
	begin := make(chan struct{})
	o := g.r.o
	o.Begin = begin
	g.r = New(o)
	g.revoke(id)
	time.Sleep(200 * time.Millisecond)
	if got := g.await(id, ledger.Revoking); g.p.count() != 1 {
		t.Errorf("it is %s, and there are %d objects", got.State, g.p.count())
	}
	close(begin)
	g.await(id, ledger.Revoked)
}
