package e2e

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
	"spectrum-os.org/broker/broker/ledger"
)

// checkChain asserts that the audit is whole.
func checkChain(t *testing.T, stateDir string) {
	t.Helper()
	r, err := ledger.Verify(context.Background(), stateDir)
	if err != nil {
		t.Errorf("the ledger cannot be verified: %v", err)
		return
	}
	if r.Broken != nil {
		t.Error(r.Broken)
	}
}

// TestGrantAndRevoke is the road that everything else extends.
func TestGrantAndRevoke(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{
		"docs/a.txt": "alpha\n", "docs/b.txt": "beta\n", "one.txt": "single\n", "public/p": "p\n", "secret/s": "s\n",
	})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	g := w.boot(vm)[0]

	t.Run("read-only directory", func(t *testing.T) {
		grant := w.grant(vm, fs("ro", p, "/docs"), "docs")
		if grant.MountPath != "/run/spectrum/fs/docs" {
			t.Errorf("it is at %q", grant.MountPath)
		}
		if out, _ := g.sh("cat /run/spectrum/fs/docs/a.txt; ls /run/spectrum/fs/docs"); out != "alpha\na.txt\nb.txt" {
			t.Errorf("the guest reads %q", out)
		}
		out, status := g.sh("mount -o remount,rw /run/spectrum/fs/docs; echo x > /run/spectrum/fs/docs/new")
		if status == 0 || !strings.Contains(out, "Read-only file system") {
			t.Errorf("a write through a read-only grant: status %d, %q", status, out)
		}
		w.revoke(grant.ID)
		w.eventually(10*time.Second, func() error { return g.absent("/run/spectrum/fs/docs") })
	})
	t.Run("writable directory", func(t *testing.T) {
		grant := w.grant(vm, fs("rw", p, "/docs"), "docs")
		if out, status := g.sh("echo gamma > /run/spectrum/fs/docs/c.txt && cat /run/spectrum/fs/docs/c.txt"); status != 0 || out != "gamma" {
			t.Errorf("status %d, %q", status, out)
		}
		if got := readFile(t, p.Dir+"/files/docs/c.txt"); got != "gamma\n" {
			t.Errorf("the host reads %q", got)
		}
		w.revoke(grant.ID)
	})
	t.Run("single file", func(t *testing.T) {
		grant := w.grant(vm, fs("ro", p, "/one.txt"), "one")
		if out, _ := g.sh("ls -A /run/spectrum/fs/one; cat /run/spectrum/fs/one/one.txt"); out != "one.txt\nsingle" {
			t.Errorf("the guest sees %q", out)
		}
		w.revoke(grant.ID)
	})
	t.Run("policy denies", func(t *testing.T) {
		_, err := w.tryGrant(vm, fs("ro", p, "/secret"), "")
		if api.CodeOf(err) != api.CodeDenied || !strings.Contains(err.Error(), "nobody gets the secrets") || !strings.Contains(err.Error(), "grant.rego:14") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("listed", func(t *testing.T) {
		all, err := w.Client.ListGrants(w.ctx(10*time.Second), api.GrantFilter{All: true})
		if err != nil {
			t.Fatal(err)
		}
		if len(all) != 3 {
			t.Errorf("%d grants, want 3", len(all))
		}
		for _, g := range all {
			if g.State != api.GrantRevoked || g.Observed.State != "gone" {
				t.Errorf("grant %s is %s and %s", g.ID, g.State, g.Observed.State)
			}
		}
	})
}

// TestGuestAPIAgainstItsDocument speaks to a VM's own socket as the VM does,
// through the validator of the committed OpenAPI document.
func TestGuestAPIAgainstItsDocument(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n"})
	vm := w.vm(p, "asker", smallVM)
	w.start()
	w.boot(vm)
	l, err := net.Listen("unix", w.Dir+"/guest.sock")
	w.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- apitest.New(t, api.GuestDocument).Proxy(ctx, l, w.VMDir(vm)+"/vsock.sock_219") }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", w.Dir+"/guest.sock")
	}}}
	defer client.CloseIdleConnections()
	call := func(method, path, body string, want int) map[string]any {
		t.Helper()
		req, err := http.NewRequestWithContext(w.ctx(time.Minute), method, "http://broker"+path, strings.NewReader(body))
		w.must(err)
		if body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		resp, err := client.Do(req)
		w.must(err)
		defer resp.Body.Close()
		var out map[string]any
		w.must(json.NewDecoder(resp.Body).Decode(&out))
		if resp.StatusCode != want {
			t.Fatalf("%s %s: %d, want %d: %v", method, path, resp.StatusCode, want, out)
		}
		return out
	}
	if self := call("GET", "/v1/self", "", 200); self["id"] != vm.String() {
		t.Errorf("the VM is told that it is %v", self["id"])
	}
	made := call("POST", "/v1/requests", `{"capability":"fs:ro:self:/docs","ttl_seconds":600}`, 201)
	id := made["grant"].(map[string]any)["id"].(string)
	call("POST", "/v1/requests", `{"capability":"fs:ro:self:/secret"}`, 403)
	call("POST", "/v1/requests", `{"capability":"fs:ro:self:/../svc"}`, 400)
	call("POST", "/v1/requests", `{"capability":"fs:ro:self:/docs","parent":"AAAA"}`, 403)
	call("POST", "/v1/capabilities/drop", `{"token":"AAAA"}`, 403)
	if list := call("GET", "/v1/capabilities", "", 200)["capabilities"].([]any); len(list) != 1 {
		t.Errorf("the VM holds %d capabilities", len(list))
	}
	call("DELETE", "/v1/capabilities/"+id, "", 200)
	call("DELETE", "/v1/capabilities/00000000-0000-4000-8000-000000000000", "", 404)
}
