package e2e

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/guest/execclient"
	"spectrum-os.org/broker/test/harness"
)

// TestHostileGuest has one guest attack the broker with all that it can send,
// while another one's grants and revocations are timed.
func TestHostileGuest(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "secret/s": "s"})
	hostile, innocent := w.vm(p, "hostile", smallVM), w.vm(p, "innocent", smallVM)
	w.start()
	a := &attack{
		world: w, vm: hostile, innocent: innocent, docs: fs("ro", p, "/docs"),
		guest: w.boot(hostile, innocent)[0],
	}
	a.idle = w.measure(innocent, a.docs, 3)
	a.memory = a.rss()
	t.Logf("idle: %v, %d KiB", a.idle, a.memory)

	t.Run("malformed calls", func(t *testing.T) { a.in(t).malformed() })
	t.Run("endless header", func(t *testing.T) {
		a.in(t).endless(`printf 'GET /v1/self HTTP/1.1\r\nHost: b\r\nx: '; tr '\0' a </dev/zero`, "431")
	})
	t.Run("endless body", func(t *testing.T) {
		a.in(t).endless(`printf 'POST /v1/requests HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n'
			(printf '2000\r\n'; head -c 8192 /dev/zero | tr '\0' ' '; printf '\r\n') >/tmp/chunk; while cat /tmp/chunk; do :; done`, "413")
	})
	t.Run("slow loris", func(t *testing.T) { a.in(t).slow() })
	t.Run("flood", func(t *testing.T) {
		a := a.in(t)
		a.during("a flood", "spectrum-test-exec", "vsock-flood", "219", "48", "600")
	})
	t.Run("storm of connections", func(t *testing.T) { a.in(t).storm() })
	t.Run("names", func(t *testing.T) { a.in(t).names(p) })
	t.Run("lying agent", func(t *testing.T) { a.in(t).lies() })
}

// attack is a hostile VM and the one that must not suffer from it.
type attack struct {
	*world
	vm, innocent uuid.UUID
	guest        *guest
	docs         string
	idle         timing
	memory       int // of the broker at rest, in KiB
}

func (a *attack) in(t *testing.T) *attack {
	b := *a
	b.world = a.sub(t)
	b.guest = &guest{b.world, a.vm, a.guest.Client}
	return &b
}

// during times the innocent VM while a command runs in the hostile one, which
// must be served honestly again afterwards.
func (a *attack) during(what string, argv ...string) {
	a.t.Helper()
	p, err := a.guest.Start(a.ctx(3*time.Minute), execclient.Command{Argv: argv})
	a.must(err)
	defer p.Kill()
	time.Sleep(500 * time.Millisecond)
	busy := a.measure(a.innocent, a.docs, 3)
	select {
	case <-p.Done():
		r, err := p.Wait()
		a.t.Errorf("%s ended before it was measured: %v, status %d, %s", what, err, r.Exit, r.Stderr)
	default:
	}
	a.keepsTime(what, a.idle, busy)
	a.bounded(what)
	p.Kill()
	a.honest(what)
}

// honest waits until the hostile guest, which behaves now, is served.
func (a *attack) honest(after string) {
	a.t.Helper()
	began := time.Now()
	a.eventually(30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), a.Stretched(10*time.Second))
		defer cancel()
		r, err := a.guest.Run(ctx, "spectrum-agent", "list", "--timeout", "5s")
		if err == nil && r.Exit != 0 {
			err = fmt.Errorf("status %d: %s", r.Exit, r.Stderr)
		}
		return err
	})
	a.t.Logf("after %s an honest call is served within %v", after, time.Since(began).Round(time.Millisecond))
}

func (a *attack) rss() int {
	a.t.Helper()
	text := readFile(a.t, fmt.Sprintf("/proc/%d/status", a.BrokerPID()))
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindStringSubmatch(text)
	if m == nil {
		a.t.Fatalf("no VmRSS in %q", text)
	}
	n, err := strconv.Atoi(m[1])
	a.must(err)
	return n
}

// bounded wants the broker's memory near what it was.
func (a *attack) bounded(what string) {
	a.t.Helper()
	const more = 64 << 10
	if now := a.rss(); now > a.memory+more {
		a.t.Errorf("during %s the broker takes %d KiB, %d at rest", what, now, a.memory)
	}
}

// send sends bytes to the guest API and returns the answer.
func (a *attack) send(raw string) string {
	a.t.Helper()
	r, err := a.guest.RunCommand(a.ctx(30*time.Second), execclient.Command{Argv: []string{"spectrum-test-exec", "vsock", "219"}, Stdin: []byte(raw)})
	a.must(err)
	return string(r.Stdout)
}

func (a *attack) malformed() {
	post := func(body string) string {
		return "POST /v1/requests HTTP/1.1\r\nHost: b\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body
	}
	for _, c := range []struct{ name, raw, status, says string }{
		{"bytes", "\x00\xff\x01\r\n\r\n", "400", ""},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "400", ""},
		{"no host", "GET /v1/self HTTP/1.1\r\nConnection: close\r\n\r\n", "400", "Host"},
		{"two lengths", "POST /v1/requests HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", "400", ""},
		{"host's route", "GET /v1/grants HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n", "404", "not_found"},
		{"half of JSON", post(`{"capability":`), "400", "complete JSON"},
		{"twice", post(`{"capability":"fs:ro:self:/docs","capability":"fs:rw:self:/docs"}`), "400", "twice"},
		{"for another", post(`{"capability":"fs:ro:self:/docs","vm":"` + a.innocent.String() + `"}`), "400", "unknown field"},
		{"nested", post(strings.Repeat(`{"capability":`, 4000)), "400", "nested"},
		{"large", post(`{"capability":"` + strings.Repeat("a", 70<<10) + `"}`), "413", "too_large"},
	} {
		got := a.send(c.raw)
		if !strings.HasPrefix(got, "HTTP/1.1 "+c.status) || !strings.Contains(got, c.says) {
			a.t.Errorf("%s: answered %.300q, want %s saying %q", c.name, got, c.status, c.says)
		}
	}
	a.bounded("malformed calls")
	a.honest("malformed calls")
}

// endless sends without end what script prints, again and again.
func (a *attack) endless(script, status string) {
	r, err := a.guest.RunCommand(a.ctx(time.Minute), execclient.Command{Argv: []string{"sh", "-c", "{ " + script + "; } 2>/dev/null | timeout -s KILL 4 spectrum-test-exec vsock 219"}})
	a.must(err)
	if !strings.HasPrefix(string(r.Stdout), "HTTP/1.1 "+status) {
		a.t.Errorf("answered %.200q (%s), want %s", r.Stdout, r.Stderr, status)
	}
	a.during("what has no end", "sh", "-c", "while :; do { "+script+"; } 2>/dev/null | timeout -s KILL 2 spectrum-test-exec vsock 219 >/dev/null 2>&1; done")
}

// slow opens more connections than it may and says next to nothing on them.
func (a *attack) slow() {
	const conns = 24
	script := fmt.Sprintf(`for i in $(seq %d); do
		( { printf 'GET /v1/self HTTP/1.1\r\nHo'; sleep 0.$i; while printf x; do sleep 1; done; } 2>/dev/null | spectrum-test-exec vsock 219 >/dev/null 2>&1 ) &
		done; wait`, conns)
	began := time.Now()
	r, err := a.guest.Run(a.ctx(time.Minute), "sh", "-c", script)
	a.must(err)
	if r.Exit != 0 {
		a.t.Errorf("status %d: %s", r.Exit, r.Stderr)
	}
	// Each connection may take 5 s over its header.
	if took := time.Since(began); took > a.Stretched(20*time.Second) {
		a.t.Errorf("slow connections were kept for %v", took)
	}
	a.during("a slow loris", "sh", "-c", "while :; do "+script+"; done")
}

// storm makes ten thousand connections.
func (a *attack) storm() {
	const attempts = 10_000
	began := time.Now()
	p, err := a.guest.Start(a.ctx(3*time.Minute), execclient.Command{Argv: []string{"spectrum-test-exec", "vsock-storm", "219", strconv.Itoa(attempts)}})
	a.must(err)
	defer p.Kill()
	busy := a.measure(a.innocent, a.docs, 3)
	a.keepsTime("a storm of connections", a.idle, busy)
	r, err := p.Wait()
	if err != nil || r.Exit != 0 {
		a.t.Errorf("the storm ended with %d, %v: %s", r.Exit, err, r.Stderr)
	}
	took := time.Since(began)
	a.t.Logf("%s attempts were let in, in %v", strings.TrimSpace(string(r.Stdout)), took.Round(time.Millisecond))
	if took > a.Stretched(time.Minute) {
		a.t.Errorf("%d attempts take %v", attempts, took)
	}
	a.bounded("a storm of connections")
	a.honest("a storm of connections")
}

// names asks under names that mean something elsewhere.
func (a *attack) names(p harness.Partition) {
	before, err := a.Client.ListGrants(a.ctx(10*time.Second), api.GrantFilter{VM: a.vm.String(), All: true})
	a.must(err)
	person := a.grant(a.vm, a.docs, "taken")
	ask := func(capability, label string) (string, int) {
		argv := []string{"spectrum-agent", "request", "--timeout", "20s", "--", capability}
		if label != "" {
			argv = slices.Insert(argv, 2, "--label="+label)
		}
		time.Sleep(60 * time.Millisecond) // stays below the rate that one guest may call at
		r, err := a.guest.Run(a.ctx(30*time.Second), argv...)
		a.must(err)
		return string(r.Stdout) + string(r.Stderr), r.Exit
	}
	const docs = "fs:ro:self:/docs"
	for _, label := range []string{"../x", "..", ".", "a/b", "/etc", "A", "é", "x\ny", "x y", "\x1b[2J", "-x", strings.Repeat("x", 64), strings.Repeat("x", 60000)} {
		if out, status := ask(docs, label); status != 2 || !strings.Contains(out, "label") {
			a.t.Errorf("label %.20q: status %d, %.300q", label, status, out)
		}
	}
	if out, status := ask(docs, "taken"); status != 1 || !strings.Contains(out, "label is in use") {
		a.t.Errorf("a label in use: status %d, %q", status, out)
	}
	// Malformed is told (2); what could be there is refused in one way (3).
	for spelling, want := range map[string]int{
		"":                                  2,
		"fs":                                2,
		"fs:ro:self:":                       2,
		"fs:ro:self:docs":                   2,
		"fs:rx:self:/docs":                  2,
		"net:ro:self:/docs":                 2,
		"fs:ro:self:/docs/../../svc":        2,
		"fs:ro:self:/./docs":                2,
		"fs:ro:self://docs":                 2,
		"fs:ro:self:/" + longPath():         2,
		"fs:ro:../../etc:/passwd":           3,
		"fs:ro:SELF:/docs":                  3,
		"fs:ro:self:/svc/policy":            3,
		"fs:ro:self:/docs\u202e":            3,
		"fs:ro:self:/\x1b]0;owned\x07":      3,
		"fs:rw:self:/secret":                3,
		"fs:ro:" + a.vm.String() + ":/docs": 3,
	} {
		out, status := ask(spelling, "")
		if status != want {
			a.t.Errorf("%.40q: status %d, want %d: %.200q", spelling, status, want, out)
		}
		if want == 3 && out != "spectrum-agent: Refused: policy does not allow this\n" {
			a.t.Errorf("%.40q: refused in other words: %.200q", spelling, out)
		}
	}
	after, err := a.Client.ListGrants(a.ctx(10*time.Second), api.GrantFilter{VM: a.vm.String(), All: true})
	a.must(err)
	if len(after) != len(before)+1 {
		a.t.Errorf("%d grants, want only the person's beside the %d before", len(after), len(before))
	}
	if err := a.guest.reads("taken", "alpha"); err != nil {
		a.t.Errorf("the person's grant: %v", err)
	}
	// What the guest wrote does not speak to the terminal of who reads it.
	out, status := a.cap("audit")
	if status != 0 || strings.ContainsAny(out, "\x1b\x07\u202e") {
		a.t.Errorf("the audit prints control characters (status %d)", status)
	}
	if !strings.Contains(out, "owned") {
		a.t.Error("the audit lacks what the guest asked for")
	}
	a.revoke(person.ID)
}

func longPath() string { return strings.TrimSuffix(strings.Repeat("aaaaaaa/", 600), "/") }

// lies replaces the agent by some that mean harm. Grants and revocations end
// in bounded time, and nobody is told that a lying agent mounted anything.
func (a *attack) lies() {
	// What is respawned in the agent's place ends at once.
	a.guest.sh("cp /bin/spectrum-agent /tmp/agent && mount -o bind /bin/false /bin/spectrum-agent; kill -9 $(pidof spectrum-agent)")
	const health = `{"agent":"spectrum-agent","version":"1","role":"app","boot_id":"00000000-0000-4000-8000-000000000000"}`
	reply := func(body string) string {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	}
	listen := func(script string) *execclient.Process {
		return a.busy(a.guest, "listening", "sh", "-c", script)
	}
	quote := func(s string) string { return "printf '" + strings.ReplaceAll(s, "\r\n", `\r\n`) + "'" }
	healthy := quote(reply(health)) + " | spectrum-test-exec vsock-liar 220 "
	believed := func() {
		a.eventually(30*time.Second, func() error {
			if vm := a.show(a.vm); vm.Agent.State != api.AgentHealthy {
				return fmt.Errorf("the liar is held to be %s (%s)", vm.Agent.State, vm.Agent.Detail)
			}
			return nil
		})
	}
	for _, c := range []struct{ name, script, says string }{
		{"garbage", `printf '\377\000 nonsense\r\n\r\n'`, "broke the protocol"},
		{"endless header", `printf 'HTTP/1.1 200 OK\r\nx: '; head -c 8000000 /dev/zero | tr '\0' a`, "headers are longer"},
		{"endless body", `printf 'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n'; head -c 8000000 /dev/zero | tr '\0' ' '`, "body is longer"},
		{"another place", quote(reply(`{"path":"/etc"}`)), "somewhere else"},
		{"terminal", quote("HTTP/1.1 500 X\r\nContent-Type: application/json\r\nContent-Length: 46\r\nConnection: close\r\n\r\n" + `{"code":"failed","message":"\\u001b[2J owned!"}`), "owned"},
	} {
		p := listen("{ " + c.script + "; } >/tmp/answer; " + healthy + "/tmp/answer")
		believed()
		began := time.Now()
		g := a.grant(a.vm, a.docs, "lied")
		granted := time.Since(began)
		a.unmounted(c.name, g)
		if !strings.Contains(g.Reason, c.says) {
			a.t.Errorf("%s: the reason %q does not say %q", c.name, g.Reason, c.says)
		}
		began = time.Now()
		a.revoke(g.ID)
		a.t.Logf("%s: grant %v (%s), revoke %v", c.name, granted.Round(time.Millisecond), g.Reason, time.Since(began).Round(time.Millisecond))
		p.Kill()
	}

	// The worst: healthy whenever it is asked, and never done with anything.
	p := listen(healthy + "-")
	believed()
	request := api.GrantRequest{VM: a.vm.String(), Capability: a.docs, Label: "early"}
	early, err := a.Client.Grant(a.ctx(time.Minute), request)
	a.must(err)
	a.eventually(20*time.Second, func() error {
		g, err := a.Client.ShowGrant(a.ctx(10*time.Second), early.ID.String())
		if err == nil && g.Observed.State != "attached" {
			err = fmt.Errorf("the grant is %s", g.Observed.State)
		}
		return err
	})
	began := time.Now()
	a.revoke(early.ID)
	if took := time.Since(began); took > 3*a.idle.revoke+a.Stretched(cutDeadline) {
		a.t.Errorf("revoking what an agent never mounts takes %v", took)
	}
	done := make(chan error, 1)
	var late api.Grant
	began = time.Now()
	go func() {
		var err error
		late, err = a.tryGrant(a.vm, a.docs, "late")
		done <- err
	}()
	time.Sleep(300 * time.Millisecond)
	busy := a.measure(a.innocent, a.docs, 3)
	a.keepsTime("a lying agent", a.idle, busy)
	a.must(<-done)
	// 10 s for the mount and some around it; what was revoked holds nothing up.
	if took := time.Since(began); took > a.Stretched(18*time.Second) {
		a.t.Errorf("a grant to a lying agent takes %v", took)
	} else {
		a.t.Logf("never done: grant %v (%s)", took.Round(time.Millisecond), late.Reason)
	}
	a.unmounted("never done", late)
	a.bounded("lies")
	p.Kill()

	// The honest agent is back, and mounts what was missed.
	a.guest.sh("umount -l /bin/spectrum-agent")
	a.eventually(40*time.Second, func() error { return a.guest.reads("late", "alpha") })
	a.revoke(late.ID)
	a.honest("lies")
	a.nothingServed(a.vm)
	if vm := a.show(a.vm); len(vm.Degraded) > 0 {
		a.t.Errorf("degraded: %q", vm.Degraded)
	}
}

// unmounted wants a grant to say that its VM did not mount it.
func (a *attack) unmounted(why string, g api.Grant) {
	a.t.Helper()
	if g.State != api.GrantActive || g.MountPath != "" || !strings.HasPrefix(g.Reason, "attached, but") {
		a.t.Errorf("%s: the grant is %s at %q: %q", why, g.State, g.MountPath, g.Reason)
	}
	if strings.ContainsRune(g.Reason, 0x1b) || len(g.Reason) > 1024 {
		a.t.Errorf("%s: the reason is not fit to be shown: %.200q", why, g.Reason)
	}
}
