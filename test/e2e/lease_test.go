package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/guest/execclient"
)

// TestRenewedLease renews a lease that a guest is reading from and holds a file
// open on. Nothing of that is interrupted at the first deadline, all of it ends
// at the second, and for neither a broker is needed.
func TestRenewedLease(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"big/blob": strings.Repeat("0123456789abcdef", 1<<17), "big/unread": strings.Repeat("unread", 1<<10)})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	g := w.boot(vm)[0]
	big := fs("ro", p, "/big")

	for name, withBroker := range map[string]bool{"with a broker": true, "without one": false} {
		t.Run(name, func(t *testing.T) {
			w := w.sub(t)
			g := &guest{w, vm, g.Client}
			label := "lease-" + fmt.Sprint(withBroker)
			dir := "/run/spectrum/fs/" + label
			first, second := int64(w.Stretched(4*time.Second)/time.Second), int64(w.Stretched(7*time.Second)/time.Second)
			made, err := w.Client.Grant(w.ctx(time.Minute), api.GrantRequest{VM: vm.String(), Capability: big, Label: label, TTLSeconds: &first, Wait: true})
			w.must(err)
			served := w.serving(vm, made.ID)
			reader := w.busy(g, "reading", "spectrum-test-exec", "read-loop", dir+"/blob")
			past := "/tmp/past-" + label
			holder := w.busy(g, "holding", "sh", "-c", fmt.Sprintf(
				`exec 4<%[1]s/unread && echo holding; while ! [ -e %[2]s ]; do sleep 0.1; done; head -c 6 <&4; echo " READ"`, dir, past))

			out, status := w.cap("renew", made.ID.String(), "--ttl", fmt.Sprintf("%ds", second))
			if status != 0 {
				t.Fatalf("exit %d: %s", status, out)
			}
			renewed, err := w.Client.ShowGrant(w.ctx(10*time.Second), made.ID.String())
			w.must(err)
			if !renewed.Expires.After(made.Expires.Add(time.Second)) || renewed.Observed.State != "attached" {
				t.Fatalf("renewed at %v, it ends at %v and is %s; it was to end at %v", renewed.Renewed, renewed.Expires, renewed.Observed.State, made.Expires)
			}
			if !withBroker {
				w.crash()
			}
			time.Sleep(time.Until(made.Expires.Add(time.Second)))
			select {
			case <-reader.Done():
				r, _ := reader.Wait()
				t.Fatalf("the reader ended at the first deadline: %d, %s", r.Exit, r.Stderr)
			default:
			}
			g.sh("touch " + past)
			if err := holder.AwaitOutput(w.ctx(20*time.Second), "READ"); err != nil {
				t.Fatal(err)
			}
			if r, _ := holder.Sofar(); !strings.Contains(string(r.Stdout), "unread READ") && time.Now().Before(*renewed.Expires) {
				t.Errorf("past the first deadline the open file gave %q: %s", r.Stdout, r.Stderr)
			}
			if now := w.serving(vm, made.ID); time.Now().Before(*renewed.Expires) && !slices.Equal(now, served) {
				t.Errorf("what serves it is %v, and was %v", now, served)
			}

			ended := w.ends(reader, w.Stretched(20*time.Second))
			if late := ended.Sub(*renewed.Expires); late < 0 || late > w.Stretched(3*time.Second) {
				t.Errorf("the guest read until %v after its lease", late)
			} else {
				t.Logf("the guest read until %v after its lease", late.Round(time.Millisecond))
			}
			w.eventually(5*time.Second, func() error { return w.stillServed(vm) })
			w.allDead(served)
			if !withBroker {
				w.start()
			}
			w.eventually(5*time.Second, func() error { return w.ended(made.ID, "expired") })
		})
	}
	checkChain(t, w.StateDir())
}

// ends waits for the end of a guest's process, and says when it was.
func (w *world) ends(p *execclient.Process, within time.Duration) time.Time {
	w.t.Helper()
	select {
	case <-p.Done():
	case <-time.After(within):
		w.t.Fatal("the guest's process goes on")
	}
	return time.Now()
}
