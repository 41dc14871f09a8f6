package kill

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/agents/guestcli"
	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/harness"
	"spectrum-os.org/broker/vmm/vmmtest"
)

// life is one life of the broker, with its clients.
type life struct {
	*world
	armedShims bool // what it starts has a failpoint of the shim's
	toward     operation
	done       atomic.Int64
	acked      atomic.Int64
	lost       atomic.Bool // somebody did not answer just now
	full       atomic.Bool // the disk is
	unrecorded atomic.Int64
}

// operation is one that a client does. It returns false where it had nothing to
// work on.
type operation = func(l *life, ctx context.Context, r *rand.Rand) bool

// client does one operation after another until ctx ends or nobody answers.
func (l *life) client(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil {
		op := operations[r.IntN(len(operations))]
		if l.full.Load() && r.IntN(2) == 0 {
			// What room the ledger has left is used up, and then it matters.
			op = onceFull[r.IntN(len(onceFull))]
		}
		if l.toward != nil && r.IntN(6) == 0 {
			op = l.toward
		}
		if op(l, ctx, r) {
			l.done.Add(1)
		}
		// A broker that dies stops answering before its end is seen.
		pause := time.Duration(0)
		if l.lost.Swap(false) {
			pause = 5 * time.Millisecond
		}
		select {
		case <-l.BrokerExited():
			return
		case <-time.After(pause):
		}
	}
}

// answered takes note of what was acknowledged, and of who does not answer.
func (l *life) answered(op string, err error) {
	switch {
	case err == nil:
		l.acked.Add(1)
		l.locked(func() { l.stats.byOperation[op]++ })
	case errors.Is(err, api.ErrUnreachable), errors.Is(err, guestcli.ErrUnreachable):
		l.lost.Store(true)
	}
}

// operations, as often as they are listed.
var operations = []operation{
	(*life).grant, (*life).grant, (*life).grant, (*life).grant,
	(*life).request, (*life).request, (*life).request,
	(*life).derive, (*life).derive,
	(*life).delegate, (*life).delegateFrom, (*life).delegateFrom, (*life).delegateFrom,
	(*life).revoke, (*life).revoke, (*life).revoke,
	(*life).drop, (*life).drop,
	(*life).useDead,
	(*life).start, (*life).start, (*life).start,
	(*life).stop,
	(*life).disturbGuest,
	(*life).rename,
	(*life).renew, (*life).renew,
	(*life).rotateKeys, (*life).revokeKey,
	(*life).rotateAudit,
}

var onceFull = []operation{(*life).rename, (*life).rename, (*life).revoke, (*life).drop, (*life).revokeKey}

// most is how many grants one VM holds before some are taken back first.
const most = 8

// machine is any VM, rather one that runs.
func (l *life) machine(r *rand.Rand) (m *machine) {
	l.locked(func() {
		for range 3 {
			if m = l.machines[r.IntN(len(l.machines))]; m.on {
				return
			}
		}
	})
	return m
}

func (l *life) held(vm *machine) int {
	return len(l.pick(func(g *grant) bool { return g.vm == vm && g.given && !g.ended }))
}

// spelling is a capability on one of the VM's partition's directories.
func spelling(r *rand.Rand, vm *machine) string {
	return fmt.Sprintf("fs:%s:%s:/d%d", []string{"ro", "rw"}[r.IntN(2)], vm.part, r.IntN(directories))
}

func ttl(r *rand.Rand) *int64 {
	if r.IntN(4) > 0 {
		return nil
	}
	seconds := int64(1 + r.IntN(2))
	return &seconds
}

// refused tells whether the broker said no, so that nothing came of it. What is
// no answer, or says that the outcome is open, is not.
func refused(err error) bool {
	var host *api.Error
	var guest *guestcli.Problem
	code := api.Code("")
	switch {
	case errors.As(err, &host):
		code = host.Code
	case errors.As(err, &guest):
		code = api.Code(guest.Code)
	default:
		return false
	}
	switch code {
	case api.CodeTimeout, api.CodeInternal, api.CodeUnavailable:
		return false
	}
	return true
}

// granted takes in the answer to a request for a grant. One that was recorded
// and then failed, or ended, is refused too.
func (l *life) granted(op string, g *grant, id uuid.UUID, expires *time.Time, err error) {
	l.answered(op, err)
	l.locked(func() {
		switch {
		case err == nil:
			g.given, g.id = true, id
			if l.keyMoves != g.keyMoves {
				g.key = ""
			}
			if expires != nil {
				g.expires = *expires
			}
		case refused(err):
			g.ended = true
		}
	})
}

func (l *life) grant(ctx context.Context, r *rand.Rand) bool {
	vm, what, lifetime := l.machine(r), "", ttl(r)
	what = spelling(r, vm)
	persist, wait := r.IntN(6) == 0, r.IntN(4) > 0
	if l.held(vm) >= most {
		return false
	}
	uses := 0
	var maxUses *int
	if r.IntN(4) == 0 {
		uses = 1 + r.IntN(3)
		maxUses = &uses
	}
	g := l.ask(vm, persist, lifetime != nil, nil)
	// One use is one attachment to a run: a grant that outlives runs uses itself up.
	l.locked(func() { g.counted = persist && maxUses != nil })
	out, err := l.Client.Grant(ctx, api.GrantRequest{
		VM: vm.id.String(), Capability: what, TTLSeconds: lifetime, Label: g.label, Persist: persist, Wait: wait, MaxUses: maxUses,
	})
	l.granted("grant", g, out.ID, out.Expires, err)
	l.note("grant %s on %s %s persist=%v wait=%v ttl=%v uses=%d -> %v %s %v", g.label, vm.name, what, persist, wait, lifetime != nil, uses, out.ID, out.State, err)
	return true
}

// delegate passes a grant on to another VM of its partition.
func (l *life) delegate(ctx context.Context, r *rand.Rand) bool {
	all := l.pick(l.delegable)
	if len(all) == 0 {
		return false
	}
	p := all[r.IntN(len(all))]
	to, lifetime := l.neighbour(p.vm), ttl(r)
	if l.held(to) >= most {
		return false
	}
	dead := false
	l.locked(func() { dead = p.ended })
	g := l.ask(to, false, lifetime != nil, p)
	out, err := l.Client.Grant(ctx, api.GrantRequest{
		VM: to.id.String(), Parent: p.id.String(), TTLSeconds: lifetime, Label: g.label, AcceptNarrower: true, Wait: true,
	})
	l.granted("delegate", g, out.ID, out.Expires, err)
	l.note("delegate %s from %s to %s ttl=%v -> %v %s %v", g.label, p.label, to.name, lifetime != nil, out.ID, out.State, err)
	if dead && err == nil {
		l.failf("grant %s was made from %s, whose end was acknowledged before", g.label, p.label)
	}
	return true
}

// guest is a client of the VM's own socket.
func (l *life) guest(vm *machine) *guestcli.Client {
	return guestcli.NewClient(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(vm.dir, "vsock.sock_219"))
	})
}

func (l *life) request(ctx context.Context, r *rand.Rand) bool {
	vm, on := l.machine(r), false
	if l.locked(func() { on = vm.on || vm.maybe }); !on {
		return false
	}
	return l.requestFrom(ctx, r, vm, nil, spelling(r, vm))
}

// derive asks for what a token of the VM's own covers.
func (l *life) derive(ctx context.Context, r *rand.Rand) bool {
	all := l.pick(func(g *grant) bool { return g.token != "" && g.given && !g.ended })
	if len(all) == 0 {
		return false
	}
	p := all[r.IntN(len(all))]
	return l.requestFrom(ctx, r, p.vm, p, "")
}

func (l *life) requestFrom(ctx context.Context, r *rand.Rand, vm *machine, parent *grant, what string) bool {
	lifetime := ttl(r)
	if l.held(vm) >= most {
		return false
	}
	req := guestcli.Request{Capability: what, TTLSeconds: lifetime}
	dead := false
	if parent != nil {
		l.locked(func() { dead = parent.ended })
		req.Parent, req.Capability = parent.token, parent.what("ro")
	}
	op := "request"
	if parent != nil {
		op = "derive"
	}
	g := l.ask(vm, false, lifetime != nil, parent)
	req.Label = g.label
	out, err := l.guest(vm).Request(ctx, req)
	id, _ := uuid.Parse(out.Grant.ID)
	l.granted(op, g, id, out.Grant.Expires, err)
	l.locked(func() { g.token, g.spelling = out.Token, req.Capability })
	from := ""
	if parent != nil {
		from = " from " + parent.label
	}
	l.note("request %s by %s%s %s ttl=%v -> %s %s %v", g.label, vm.name, from, req.Capability, lifetime != nil, out.Grant.ID, out.Grant.State, err)
	if dead && err == nil {
		l.failf("grant %s was made from %s, whose end was acknowledged before", g.label, parent.label)
	}
	return true
}

// useDead shows a token whose grant has ended.
func (l *life) useDead(ctx context.Context, r *rand.Rand) bool {
	all := l.pick(func(g *grant) bool { return g.token != "" && g.ended })
	if len(all) == 0 {
		return false
	}
	p := all[r.IntN(len(all))]
	return l.requestFrom(ctx, r, p.vm, p, "")
}

// what is the grant's capability with these rights.
func (g *grant) what(rights string) string { return "fs:" + rights + g.spelling[len("fs:ro"):] }

func (l *life) revoke(ctx context.Context, r *rand.Rand) bool {
	all := l.pick(func(g *grant) bool { return g.given && !g.ended })
	if len(all) == 0 {
		return false
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = all[:min(len(all), 1+r.IntN(3))]
	req := api.RevokeRequest{Wait: r.IntN(4) > 0}
	names := ""
	for _, g := range all {
		req.IDs = append(req.IDs, g.id.String())
		names += " " + g.label
	}
	l.ending(all...)
	out, err := l.Client.Revoke(ctx, req)
	l.note("revoke%s wait=%v -> %d revoked %d revoking %v", names, req.Wait, len(out.Revoked), len(out.Revoking), err)
	l.answered("revoke", err)
	var unrecorded *api.Error
	if errors.As(err, &unrecorded) && unrecorded.Code == api.CodeUnavailable && strings.HasPrefix(unrecorded.Detail, "access was cut, but") {
		// It could not be recorded, and holds all the same.
		l.unrecorded.Add(1)
		l.gone(all...)
		for _, g := range all {
			l.mustBeGone(ctx, g.vm.id, g.id)
		}
	}
	if err != nil {
		return true
	}
	l.gone(all...)
	for _, g := range out.Revoked {
		l.mustBeGone(ctx, g.Holder, g.ID)
	}
	return true
}

func (l *life) drop(ctx context.Context, r *rand.Rand) bool {
	all := l.pick(func(g *grant) bool { return g.given && !g.ended })
	if len(all) == 0 {
		return false
	}
	g := all[r.IntN(len(all))]
	l.ending(g)
	var out guestcli.Grant
	var err error
	if g.token != "" && r.IntN(2) == 0 {
		out, err = l.guest(g.vm).DropToken(ctx, g.token)
	} else {
		out, err = l.guest(g.vm).Drop(ctx, g.id.String())
	}
	l.note("drop %s by %s -> %s %v", g.label, g.vm.name, out.State, err)
	l.answered("drop", err)
	if err != nil {
		return true
	}
	l.gone(g)
	if out.State == string(api.GrantRevoked) {
		l.mustBeGone(ctx, g.vm.id, g.id)
	}
	return true
}

func (l *life) start(ctx context.Context, r *rand.Rand) bool {
	vm := l.machines[r.IntN(len(l.machines))]
	if !vm.busy.TryLock() {
		return false
	}
	defer vm.busy.Unlock()
	var on, maybe bool
	l.locked(func() { on, maybe = vm.on, vm.maybe })
	if on && !maybe {
		return false
	}
	l.disturb(vm)
	if l.armedShims {
		l.arm(vm)
	}
	out, err := l.Client.StartVM(ctx, vm.id.String())
	l.answered("start", err)
	l.locked(func() {
		switch {
		case err == nil:
			vm.on, vm.maybe, vm.run, vm.shim, vm.armed = true, false, out.Instance, out.ShimPID, l.armedShims
		case refused(err) && !maybe && !l.armedShims:
			vm.maybe = false
		}
	})
	l.note("start %s -> %s %v", vm.name, out.Instance, err)
	return true
}

// arm says that a VM may die of its shim's failpoint from now on.
func (m *model) arm(vm *machine) {
	m.locked(func() {
		vm.armed = true
		for _, g := range m.grants {
			if g.vm == vm {
				g.mayEnd = true
			}
		}
	})
}

func (l *life) stop(ctx context.Context, r *rand.Rand) bool {
	vm := l.machine(r)
	if !vm.busy.TryLock() {
		return false
	}
	defer vm.busy.Unlock()
	grace := float64(r.IntN(2)) / 2
	tied := l.disturb(vm)
	_, err := l.Client.StopVM(ctx, vm.id.String(), api.StopRequest{GraceSeconds: &grace})
	l.answered("stop", err)
	if err == nil {
		l.locked(func() { vm.on, vm.maybe, vm.armed = false, false, false })
		l.gone(tied...)
	}
	l.note("stop %s grace=%v -> %v", vm.name, grace, err)
	return true
}

// disturbGuest is what happens without the broker: a guest reboots, shuts down,
// ejects a device, or its VMM crashes.
func (l *life) disturbGuest(ctx context.Context, r *rand.Rand) bool {
	vm := l.machine(r)
	if !vm.busy.TryLock() {
		return false
	}
	defer vm.busy.Unlock()
	var on bool
	l.locked(func() { on = vm.on })
	if !on {
		return false
	}
	word := []string{"reboot", "shutdown", "crash", "eject", "crash-in-add"}[r.IntN(5)]
	line := word
	if word == "eject" {
		all := l.pick(func(g *grant) bool { return g.vm == vm && g.given && !g.ended })
		if len(all) == 0 {
			return false
		}
		g := all[r.IntN(len(all))]
		l.ending(g)
		line += " fs-fs-" + g.id.String()
	} else {
		l.disturb(vm)
		if word == "crash-in-add" {
			// The guest goes on until then.
			l.arm(vm)
		}
	}
	err := tellGuest(ctx, vm, line)
	l.note("guest %s: %s -> %v", vm.name, line, err)
	return true
}

func tellGuest(ctx context.Context, vm *machine, line string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(vm.dir, vmmtest.Socket))
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return err
	}
	_, _ = bufio.NewReader(conn).ReadString('\n') // one that crashes says nothing
	return nil
}

func (l *life) rename(ctx context.Context, r *rand.Rand) bool {
	p := l.parts[r.IntN(len(l.parts))]
	n := l.names[p.ID]
	if !n.busy.TryLock() {
		return false
	}
	defer n.busy.Unlock()
	name := fmt.Sprintf("p%d-%c", r.IntN(1000), 'a'+byte(partIndex(l.parts, p)))
	l.locked(func() { n.asked = name })
	_, err := l.Client.SetName(ctx, name, p.ID)
	l.answered("rename", err)
	if err == nil {
		l.locked(func() { n.is, n.asked = name, "" })
	}
	l.note("name %s %s -> %v", p.ID, name, err)
	return true
}

func partIndex(all []harness.Partition, p harness.Partition) int {
	for i := range all {
		if all[i].ID == p.ID {
			return i
		}
	}
	return -1
}

// killShim kills the shim of a VM that runs, and with it all of the VM.
func (l *life) killShim(r *rand.Rand) bool {
	vm := l.machine(r)
	if !vm.busy.TryLock() {
		return false
	}
	defer vm.busy.Unlock()
	var pid int
	l.locked(func() {
		if vm.on && !vm.maybe && !vm.armed {
			pid = vm.shim
		}
	})
	if pid == 0 || !isShim(pid) {
		return false
	}
	tied := l.disturb(vm)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return false
	}
	l.locked(func() {
		vm.on, vm.maybe = false, false
		for _, g := range tied {
			g.doomed = true
		}
	})
	l.stats.shims++
	l.note("killed the shim of %s (%d)", vm.name, pid)
	return true
}
