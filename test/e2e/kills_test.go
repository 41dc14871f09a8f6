package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

// atGrant, atCut and atStart are the failpoints at which a broker is killed
// while it grants, while it revokes and while it starts. Those of atCut are
// passed once the revocation is durable, apart from the first. Those of the
// ledger are for test/kill: a start comes by them too.
var (
	atGrant = []string{
		"request.decided", "request.recorded", "apply.before", "fs.opened", "fs.put", "apply.after", "request.active",
	}
	atCut = []string{
		"revoke.before",
		"revoke.recorded", "withdraw.before", "fs.removed", "withdraw.after", "withdraw.recorded", "revoke.answer",
	}
	atStart = []string{
		"ledger.settle.after", "start.recorded", "start.scanned", "adopt.before", "adopt.after", "start.adopted",
		"start.ended", "start.policies", "start.caughtup", "ready.before", "ready.after",
	}
)

// TestKills kills the broker at failpoints, with a real guest: what it holds
// it goes on reading, what was revoked it never reads again, and nothing is
// left. What the guest cannot show is in test/kill.
func TestKills(t *testing.T) {
	needTools(t)
	if armed.broker == "" || armed.shim == "" {
		t.Skip("SKIP needs programs that were built with failpoints: -armed-broker and -armed-shim (test/README.md)")
	}
	seed := killSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	t.Logf("seed %d (-kill-seed): the same kills at the same failpoints", seed)
	r := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // to be replayed
	w := newWorld(t)
	w.Tools.Broker, w.Tools.Shim = armed.broker, armed.shim
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "kept/k.txt": "kept\n"})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	k := &killed{world: w, vm: vm, docs: fs("ro", p, "/docs"), guest: w.boot(vm)[0]}
	k.instance = w.show(vm).Instance
	k.kept = w.grant(vm, fs("rw", p, "/kept"), "kept")
	// A reader that never stops, and holds its file open: a kill that takes
	// anything from the guest even for a moment ends it.
	k.reader()
	for n := range killTimes {
		k.n = n
		switch n % 3 {
		case 0:
			k.whileCutting(atCut[r.IntN(len(atCut))])
		case 1:
			k.whileGranting(atGrant[r.IntN(len(atGrant))])
		case 2:
			k.whileStarting(atStart[r.IntN(len(atStart))])
		}
		k.whole()
		if t.Failed() {
			t.Fatalf("kill %d of seed %d", n, seed)
		}
	}
	w.revoke(k.kept.ID)
	if err := k.guest.reads("kept", "kept"); err == nil {
		t.Error("the guest reads on after the revocation")
	}
	w.nothingServed(vm)
}

// killed is a world whose broker is killed, and what must outlive that.
type killed struct {
	*world
	vm       uuid.UUID
	docs     string
	guest    *guest
	instance string
	kept     api.Grant
	n        int
}

// restart starts a broker, armed with a failpoint where one is named.
func (k *killed) restart(label string) {
	k.t.Helper()
	k.BrokerEnv = nil
	if label != "" {
		k.BrokerEnv = []string{"SPECTRUM_FAILPOINTS=" + label + ":1:kill"}
	}
	k.start()
}

// died waits for the broker to be dead of its failpoint. One that did not come
// by it is killed now.
func (k *killed) died(label string) {
	k.t.Helper()
	select {
	case <-k.BrokerExited():
		if k.BrokerSignal() != syscall.SIGKILL {
			k.t.Errorf("the broker ended of %v at %s", k.BrokerSignal(), label)
		}
	case <-time.After(k.Stretched(10 * time.Second)):
		k.t.Logf("nothing came by %s", label)
	}
	k.crash()
}

func (k *killed) whileGranting(label string) {
	k.t.Helper()
	k.crash()
	k.restart(label)
	name := fmt.Sprintf("grant-%d", k.n)
	got, err := k.tryGrant(k.vm, k.docs, name)
	told := err == nil && got.State == api.GrantActive
	k.died(label)
	k.restart("")
	now := k.settled(name)
	k.t.Logf("%s while granting: answered %v, then %q", label, told, now.State)
	switch {
	case now.State == api.GrantActive:
		k.eventually(10*time.Second, func() error { return k.guest.reads(name, "alpha") })
		k.revoke(now.ID)
	case told:
		k.t.Errorf("%s was acknowledged, and is %q after the kill at %s (%s)", name, now.State, label, now.Reason)
	}
	if k.guest.reads(name, "alpha") == nil {
		k.t.Errorf("%s has ended, and the guest reads it", name)
	}
}

func (k *killed) whileCutting(label string) {
	k.t.Helper()
	name := fmt.Sprintf("cut-%d", k.n)
	grant := k.grant(k.vm, k.docs, name)
	if err := k.guest.reads(name, "alpha"); err != nil {
		k.t.Fatal(err)
	}
	served := k.serving(k.vm, grant.ID)
	k.crash()
	k.restart(label)
	_, err := k.Client.Revoke(k.ctx(time.Minute), api.RevokeRequest{IDs: []string{grant.ID.String()}, Wait: true})
	k.died(label)
	k.restart("")
	now := k.settled(name)
	k.t.Logf("%s while revoking: answered %v, then %q", label, err == nil, now.State)
	durable := label != atCut[0]
	switch {
	case now.State == api.GrantActive && !durable && err != nil:
		if err := k.guest.reads(name, "alpha"); err != nil {
			k.t.Errorf("%s was not revoked, and %v", name, err)
		}
		k.revoke(grant.ID)
	case now.State != api.GrantRevoked:
		k.t.Fatalf("%s is %s after a revocation that was killed at %s", name, now.State, label)
	}
	k.allDead(served)
	if k.guest.reads(name, "alpha") == nil {
		k.t.Errorf("%s is revoked, and the guest reads it", name)
	}
}

func (k *killed) whileStarting(label string) {
	k.t.Helper()
	k.crash()
	k.BrokerEnv = []string{"SPECTRUM_FAILPOINTS=" + label + ":1:kill"}
	err := k.StartBroker(k.ctx(60 * time.Second))
	k.died(label)
	k.t.Logf("%s while starting: was ready before %v", label, err == nil)
	k.restart("")
}

// reader starts the guest's endless reader.
func (k *killed) reader() {
	k.t.Helper()
	out, status := k.guest.sh(`(exec 3</run/spectrum/fs/kept/k.txt; i=0; while cat /run/spectrum/fs/kept/k.txt >/dev/null && echo $i >/run/spectrum/fs/kept/.count; do i=$((i+1)); sleep 0.05; done; echo stopped >/tmp/reader) >/dev/null 2>&1 & echo begun`)
	if status != 0 || out != "begun" {
		k.t.Fatalf("the reader does not begin: %q", out)
	}
}

// whole asserts that the VM and what it held all along go on, and that nothing
// but that is there.
func (k *killed) whole() {
	k.t.Helper()
	if v := k.show(k.vm); v.Instance != k.instance || v.State != api.VMRunning {
		k.t.Errorf("the VM is %s in run %s, want it running in %s (degraded: %v)", v.State, v.Instance, k.instance, v.Degraded)
	}
	if err := k.guest.reads("kept", "kept"); err != nil {
		k.t.Error(err)
	}
	before, _ := k.guest.sh("cat /run/spectrum/fs/kept/.count")
	k.eventually(10*time.Second, func() error {
		if now, _ := k.guest.sh("cat /run/spectrum/fs/kept/.count"); now == before {
			return errors.New("the reader stands still")
		}
		return nil
	})
	if out, status := k.guest.sh("cat /tmp/reader"); status == 0 {
		k.t.Errorf("the reader %s", out)
	}
	if now := k.settled("kept"); now.ID != k.kept.ID || now.State != api.GrantActive || now.Observed.State != "attached" {
		k.t.Errorf("the grant that was never taken back is %s and %s", now.State, now.Observed.State)
	}
	state := k.shimState(k.vm)
	if len(state.Objects) != 1 || state.Objects[0].ID != "fs-"+k.kept.ID.String() {
		k.t.Errorf("the shim has %+v, want the one share that is granted", state.Objects)
	}
	shares := 0
	for _, pid := range descendants(state.ShimPid) {
		if strings.Contains(cmdline(pid), "virtiofsd") {
			shares++
		}
	}
	if shares != 1 {
		k.t.Errorf("%d processes serve one share", shares)
	}
	checkChain(k.t, k.StateDir())
}
