package e2e

import (
	"crypto/ed25519"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/test/guest/execclient"
)

// TestTokensOfOthers has a guest present tokens that are not its own, in both
// places where it can, and wants each refused, on record, and without effect.
func TestTokensOfOthers(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n"})
	owner, thief := w.vm(p, "owner", smallVM), w.vm(p, "thief", smallVM)
	w.start()
	guests := w.boot(owner, thief)
	kinds := capabilities.NewKinds(capabilities.FS{})

	grant := w.grant(owner, fs("ro", p, "/docs"), "docs")
	token, err := w.Client.Token(w.ctx(10*time.Second), grant.ID.String())
	w.must(err)
	raw, err := base64.RawURLEncoding.DecodeString(token.Token)
	w.must(err)
	short := w.short(thief, fs("ro", p, "/docs"))

	c, err := kinds.Parse(fs("ro", p, "/docs"), nil)
	w.must(err)
	_, key, err := ed25519.GenerateKey(nil)
	w.must(err)
	health, err := w.Client.Health(w.ctx(10 * time.Second))
	w.must(err)
	foreign, err := capabilities.NewSigner(key, uuid.NewString()).Mint(capabilities.Claims{
		Holder: thief, Grant: uuid.New(), IssuedAt: time.Now(), Epoch: health.Epoch, Capability: c,
	})
	w.must(err)
	flipped := append([]byte(nil), raw...)
	flipped[len(flipped)/2] ^= 1

	text := base64.RawURLEncoding.EncodeToString
	cases := []struct{ name, token, reason string }{
		{"another VM's", token.Token, "holder"},
		{"truncated", text(raw[:len(raw)-1]), "malformed"},
		{"extended", text(append(append([]byte(nil), raw...), 0)), "malformed"},
		{"forged", text(flipped), ""},
		{"of another broker's key", text(foreign), "key"},
		{"expired", short, "expired"},
	}
	for _, c := range cases {
		before := w.refusals(thief)
		put := execclient.Command{Argv: []string{"sh", "-c", "cat > /tmp/token"}, Stdin: []byte(c.token)}
		if _, err := guests[1].RunCommand(w.ctx(time.Minute), put); err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{
			"spectrum-agent request fs:ro:self:/docs --parent-file /tmp/token",
			"spectrum-agent drop --token-file /tmp/token",
		} {
			out, status := guests[1].sh(line)
			if status != 3 || !strings.Contains(out, "refused") {
				t.Errorf("%s, %s: status %d, %q", c.name, line, status, out)
			}
		}
		after := w.refusals(thief)
		if len(after) != len(before)+2 {
			t.Errorf("%s: %d refusals on record, want 2", c.name, len(after)-len(before))
			continue
		}
		for _, e := range after[len(before):] {
			if !strings.Contains(strings.ToLower(string(e.Data)), c.reason) {
				t.Errorf("%s: the audit says %s, not %q", c.name, e.Data, c.reason)
			}
		}
	}
	g, err := w.Client.ShowGrant(w.ctx(10*time.Second), grant.ID.String())
	if err != nil || g.State != api.GrantActive {
		t.Errorf("the owner's grant is %s, %v", g.State, err)
	}
	if out, _ := guests[0].sh("cat /run/spectrum/fs/docs/a.txt"); out != "alpha" {
		t.Errorf("the owner reads %q", out)
	}
}

// short is a token of a grant whose lease has ended.
func (w *world) short(vm uuid.UUID, capability string) string {
	w.t.Helper()
	ttl := int64(3)
	g, err := w.Client.Grant(w.ctx(time.Minute), api.GrantRequest{VM: vm.String(), Capability: capability, Label: "short", TTLSeconds: &ttl, Wait: false})
	w.must(err)
	token, err := w.Client.Token(w.ctx(10*time.Second), g.ID.String())
	w.must(err)
	time.Sleep(time.Until(*g.Expires) + time.Second)
	return token.Token
}

func (w *world) refusals(vm uuid.UUID) []api.Event {
	w.t.Helper()
	list, err := w.Client.Audit(w.ctx(10*time.Second), api.EventQuery{VM: vm.String(), Types: []string{"token.refused"}, Limit: 1000})
	w.must(err)
	return list.Events
}

// TestGuestRequests is what an honest guest does by itself, and how it is
// refused without learning why.
func TestGuestRequests(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "docs/sub/b": "b\n", "secret/s": "s"})
	q := w.partition(map[string]string{"private/x": "x"})
	vm := w.vm(p, "asker", smallVM)
	w.start()
	g := w.boot(vm)[0]

	out, status := g.sh("spectrum-agent request fs:ro:self:/docs --label docs --token-file /tmp/t -o json && cat /run/spectrum/fs/docs/a.txt")
	if status != 0 || !strings.Contains(out, "alpha") {
		t.Fatalf("status %d, %q", status, out)
	}
	out, status = g.sh("spectrum-agent request fs:ro:self:/docs/sub --label sub --parent-file /tmp/t && cat /run/spectrum/fs/sub/b")
	if status != 0 || !strings.HasSuffix(out, "b") {
		t.Errorf("derived: status %d, %q", status, out)
	}
	out, status = g.sh("spectrum-agent request fs:rw:self:/docs/sub --parent-file /tmp/t")
	if status != 3 {
		t.Errorf("a child wider than its parent: status %d, %q", status, out)
	}
	// Policy's no, a path that is not there, and a partition that may or may
	// not exist: all in the same words.
	var words []string
	for _, c := range []string{"fs:ro:self:/secret", "fs:ro:self:/missing", fs("ro", q, "/private"), "fs:ro:" + uuid.NewString() + ":/x", "fs:ro:work:/x"} {
		out, status := g.sh("spectrum-agent request " + c)
		if status != 3 {
			t.Errorf("%s: status %d, %q", c, status, out)
		}
		words = append(words, out)
	}
	for _, s := range words[1:] {
		if s != words[0] {
			t.Errorf("the guest can tell %q from %q", s, words[0])
		}
	}
	out, status = g.sh("spectrum-agent list")
	if status != 0 || !strings.Contains(out, "docs") || !strings.Contains(out, "sub") {
		t.Errorf("list: status %d, %q", status, out)
	}
	// Dropping the parent takes the child along.
	if out, status = g.sh("spectrum-agent drop --token-file /tmp/t"); status != 0 {
		t.Errorf("drop: status %d, %q", status, out)
	}
	for _, path := range []string{"docs", "sub"} {
		w.eventually(10*time.Second, func() error { return g.absent("/run/spectrum/fs/" + path) })
	}
}
