package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/agents/guestcli"
	"spectrum-os.org/broker/broker/api"
)

// capID is the grant that a command of spectrum-cap made.
func (w *world) capID(args ...string) uuid.UUID {
	w.t.Helper()
	out, status := w.cap(append(args, "-q")...)
	id, err := uuid.Parse(strings.TrimSpace(out))
	if status != 0 || err != nil {
		w.t.Fatalf("%v: status %d, %q", args, status, out)
	}
	return id
}

// passes is what a guest passes on to another VM.
func (g *guest) passes(grant, to uuid.UUID, more string) guestcli.Grant {
	g.w.t.Helper()
	out, status := g.sh("spectrum-agent delegate " + grant.String() + " --to " + to.String() + " -o json " + more)
	var made struct{ Grant guestcli.Grant }
	if err := json.Unmarshal([]byte(out), &made); status != 0 || err != nil {
		g.w.t.Fatalf("status %d, %s", status, out)
	}
	return made.Grant
}

// alpha says whether the guest reads the file that is in each directory.
func (g *guest) alpha(label string) error {
	g.w.t.Helper()
	if out, status := g.sh("cat /run/spectrum/fs/" + label + "/a.txt"); status != 0 || out != "alpha" {
		return fmt.Errorf("the guest reads %q from %s, status %d", out, label, status)
	}
	return nil
}

// TestDelegation has a person and a guest pass a grant on, and what they passed on
// end with it.
func TestDelegation(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "docs/sub/a.txt": "alpha\n", "docs/sub/deep/a.txt": "alpha\n"})
	first, second, third := w.vm(p, "first", smallVM), w.vm(p, "second", smallVM), w.vm(p, "third", smallVM)
	w.start()
	guests := w.boot(first, second)
	a, b := guests[0], guests[1]

	t.Run("what was passed on ends with what it derives from", func(t *testing.T) {
		w := w.sub(t)
		a, b := &guest{w, first, a.Client}, &guest{w, second, b.Client}
		root := w.grant(first, fs("ro", p, "/docs"), "docs")
		child := w.capID("delegate", root.ID.String(), "--to", second.String(), "--narrow", fs("ro", p, "/docs/sub"), "--as", "sub")
		w.must(b.alpha("sub"))
		if out, _ := b.sh("ls /run/spectrum/fs /run/spectrum/fs/sub"); strings.Contains(out, "docs") || !strings.Contains(out, "deep") {
			t.Errorf("the second VM sees %q", out)
		}
		var list struct{ Capabilities []guestcli.Grant }
		if out, _ := b.sh("spectrum-agent list -o json"); json.Unmarshal([]byte(out), &list) != nil || len(list.Capabilities) != 1 || list.Capabilities[0].From != first.String() {
			t.Errorf("it is not told who delegated: %s", out)
		}
		// Wider, to a VM that does not exist, and to one that it may not know of.
		if out, status := b.sh("spectrum-agent delegate " + child.String() + " --to " + first.String() + " --narrow " + fs("ro", p, "/docs")); status != guestcli.ExitUsage || !strings.Contains(out, "is not covered by") {
			t.Errorf("wider: status %d, %s", status, out)
		}
		unknown, status := b.sh("spectrum-agent delegate " + child.String() + " --to " + uuid.NewString())
		hidden, same := b.sh("spectrum-agent delegate " + child.String() + " --to " + third.String())
		if status != guestcli.ExitDenied || same != status || unknown != hidden {
			t.Errorf("status %d, %q for a VM that is not there, status %d, %q for one that must not be known", status, unknown, same, hidden)
		}
		// Back to the one that it was introduced to, by the token that it fetches.
		if out, status := b.sh("spectrum-agent token " + child.String() + " --token-file /tmp/child.token; spectrum-agent delegate --token-file /tmp/child.token --to " + first.String() +
			" --narrow " + fs("ro", p, "/docs/sub/deep") + " --label back"); status != 0 {
			t.Errorf("status %d, %s", status, out)
		}
		w.eventually(30*time.Second, func() error { return a.alpha("back") })

		out, status := w.cap("revoke", root.ID.String(), "--dry-run")
		if status != 0 || !strings.Contains(out, "3 would be revoked") {
			t.Errorf("status %d, %s", status, out)
		}
		w.must(a.alpha("docs"))
		// Both hold files open, which the revocation takes from them.
		for _, g := range []*guest{a, b} {
			label := map[uuid.UUID]string{first: "back", second: "sub"}[g.vm]
			g.sh("exec 3</run/spectrum/fs/" + label + "/a.txt; (sleep 1000 <&3) >/dev/null 2>&1 &")
		}
		res := w.revoke(root.ID)
		if len(res.Revoked) != 3 {
			t.Errorf("%d were revoked, want 3", len(res.Revoked))
		}
		w.nothingServed(first)
		w.nothingServed(second)
		for _, g := range []*guest{a, b} {
			if out, status := g.sh("cat /run/spectrum/fs/*/a.txt"); status == 0 {
				t.Errorf("VM %s still reads %q", g.vm, out)
			}
		}
		revoking := 0
		for _, e := range w.audit(api.EventQuery{Types: []string{"grant.revoking"}, Limit: 100}) {
			if e.Actor.Kind == "person" {
				revoking++
			}
		}
		if revoking != 1 {
			t.Errorf("one revocation is %d rows", revoking)
		}
	})

	t.Run("a budget of two is two", func(t *testing.T) {
		w := w.sub(t)
		a, b := &guest{w, first, a.Client}, &guest{w, second, b.Client}
		root := w.capID("grant", first.String(), fs("ro", p, "/docs"), "--as", "counted", "--max-uses", "2")
		child := w.capID("delegate", root.String(), "--to", second.String(), "--as", "counted")
		w.must(a.alpha("counted"))
		w.must(b.alpha("counted"))
		if out, _ := w.cap("list", "--holder", second.String()); !strings.Contains(out, "1 of 2") {
			t.Errorf("the list says %s", out)
		}
		// The third is refused, to a person and to the guest, and takes nothing away.
		if out, status := w.cap("delegate", root.String(), "--to", second.String(), "--as", "third"); status == 0 || !strings.Contains(out, "used up") {
			t.Errorf("status %d, %s", status, out)
		}
		if out, status := b.sh("spectrum-agent delegate " + child.String() + " --to " + first.String()); status == 0 {
			t.Errorf("a third use: %s", out)
		}
		if out, status := b.sh("spectrum-agent token " + child.String() + " --token"); status == 0 {
			t.Errorf("the token of what is used up: %s", out)
		}
		w.must(a.alpha("counted"))
		w.must(b.alpha("counted"))
		w.revoke(root)
		w.nothingServed(first)
		w.nothingServed(second)
	})

	t.Run("a guest takes back what it delegated", func(t *testing.T) {
		w := w.sub(t)
		a, b := &guest{w, first, a.Client}, &guest{w, second, b.Client}
		root := w.grant(first, fs("ro", p, "/docs"), "docs")
		child := w.capID("delegate", root.ID.String(), "--to", second.String(), "--as", "sub")
		back := b.passes(child, first, "--label back --ttl 1h")
		w.eventually(30*time.Second, func() error { return a.alpha("back") })
		b.sh("spectrum-agent drop " + back.ID)
		w.eventually(30*time.Second, func() error { return a.absent("/run/spectrum/fs/back") })
		w.must(b.alpha("sub"))
		// The root's holder ends, and what it gave with it, in the other VM too.
		now := 0.0
		_, err := w.Client.StopVM(w.ctx(time.Minute), first.String(), api.StopRequest{GraceSeconds: &now})
		w.must(err)
		w.eventually(30*time.Second, func() error { return b.absent("/run/spectrum/fs/sub") })
		w.eventually(30*time.Second, func() error { return w.stillServed(second) })
	})
}
