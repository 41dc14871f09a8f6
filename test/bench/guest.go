package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/guest/execclient"
	"spectrum-os.org/broker/test/harness"
	"spectrum-os.org/broker/vmm"
)

// onAGuest compares a grant with the same steps by hand, on one guest, in
// turn: start virtiofsd, add the device, mount, read the first byte.
func (b *bench) onAGuest() error {
	if err := b.tools.Missing(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: SKIP all that needs a guest:", err)
		return nil
	}
	dir, remove, err := scratch()
	if err != nil {
		return err
	}
	defer remove()
	d, err := harness.New(b.tools, dir)
	if err != nil {
		return err
	}
	defer d.Close()
	p, err := d.AddPartition(map[string]string{"docs/a.txt": "alpha\n"}, map[string]string{"grant.rego": "package spectrum.grant\n\nallow := true\n"})
	if err != nil {
		return err
	}
	vm, err := d.AddVM(p, "guest", "memory_mib = 256\nvcpus = 1\n")
	if err != nil {
		return err
	}
	if err := d.HostPolicy("host.rego", hostPolicy); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(b.ctx, d.Stretched(5*time.Minute))
	defer cancel()
	if err := d.StartBroker(ctx); err != nil {
		return err
	}
	guest, err := d.Boot(ctx, vm)
	if err != nil {
		return err
	}
	h := &byHand{d: d, p: p, vm: vm, guest: guest}
	// Both once, uncounted, so that neither pays for what is done once.
	var granted, hand time.Duration
	for round := range 10 {
		g, err := viaBroker(ctx, d, vm, p, guest)
		if err != nil {
			return err
		}
		m, err := h.once(ctx)
		if err != nil {
			return fmt.Errorf("by hand: %w", err)
		}
		switch {
		case round == 1:
			granted, hand = g, m
		case round > 1:
			granted, hand = min(granted, g), min(hand, m)
		}
	}
	b.add(Row{What: "grant to the guest's first byte", Value: granted.Seconds() * 1e3, Unit: "ms", Probe: hand.Seconds() * 1e3, Of: "the same steps by hand", Bound: ratio, Target: 1.3})
	v, err := d.Client.ShowVM(ctx, vm.String())
	if err != nil {
		return err
	}
	mb, err := memory(v.ShimPID, "Private_Clean", "Private_Dirty")
	if err != nil {
		return err
	}
	b.add(Row{What: "memory of a shim, its own", Value: mb, Unit: "MB", Bound: absolute, Target: 10})
	b.add(Row{What: "memory of an idle virtiofsd, its own", Value: h.idle, Unit: "MB", Bound: told})
	return nil
}

func firstByte(ctx context.Context, guest *execclient.Client, path string) error {
	out, err := guest.Output(ctx, "cat", path)
	if err == nil && out != "alpha" {
		err = fmt.Errorf("the guest reads %q", out)
	}
	return err
}

func viaBroker(ctx context.Context, d *harness.Desktop, vm uuid.UUID, p harness.Partition, guest *execclient.Client) (time.Duration, error) {
	began := time.Now()
	g, err := d.Client.Grant(ctx, api.GrantRequest{VM: vm.String(), Capability: "fs:ro:" + p.ID.String() + ":/docs", Label: "docs", Wait: true})
	if err != nil {
		return 0, err
	}
	if err := firstByte(ctx, guest, "/run/spectrum/fs/docs/a.txt"); err != nil {
		return 0, fmt.Errorf("%w (%s)", err, g.Reason)
	}
	took := time.Since(began)
	r, err := d.Client.Revoke(ctx, api.RevokeRequest{IDs: []string{g.ID.String()}, Wait: true})
	if err == nil && len(r.Revoked) != 1 {
		err = fmt.Errorf("the grant is not revoked")
	}
	return took, err
}

type byHand struct {
	d     *harness.Desktop
	p     harness.Partition
	vm    uuid.UUID
	guest *execclient.Client
	n     int
	idle  float64 // memory of one virtiofsd, its own, in MB
}

func (h *byHand) once(ctx context.Context) (time.Duration, error) {
	h.n++
	id := fmt.Sprintf("hand%d", h.n)
	socket := filepath.Join(h.d.Dir, id+".sock")
	began := time.Now()
	cmd := exec.CommandContext(ctx, h.d.Tools.Virtiofsd, "--socket-path", socket, "--shared-dir", filepath.Join(h.p.Dir, "files/docs"), "--sandbox", "none", "--readonly")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	for !exists(socket) {
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		time.Sleep(time.Millisecond)
	}
	client := vmm.NewClient(filepath.Join(h.d.VMDir(h.vm), "vmm.sock"))
	if _, err := client.AddFS(ctx, vmm.FSConfig{ID: id, Tag: id, Socket: socket, NumQueues: 1, QueueSize: 1024, PCISegment: 1}); err != nil {
		return 0, err
	}
	// One command, as to start each costs an emulated guest more than to mount.
	mount := fmt.Sprintf("mkdir -p /mnt/%[1]s; n=0; until mount -t virtiofs -o ro %[1]s /mnt/%[1]s 2>/dev/null; do n=$((n+1)); [ $n -lt 2000 ] || exit 1; usleep 5000; done; cat /mnt/%[1]s/a.txt", id)
	out, err := h.guest.Shell(ctx, mount)
	if err == nil && strings.TrimSpace(out) != "alpha" {
		err = fmt.Errorf("the guest reads %q", out)
	}
	if err != nil {
		return 0, fmt.Errorf("mount: %w", err)
	}
	took := time.Since(began)
	if h.idle == 0 {
		if h.idle, err = memory(cmd.Process.Pid, "Private_Clean", "Private_Dirty"); err != nil {
			return 0, err
		}
	}
	if _, err := h.guest.Shell(ctx, "umount /mnt/"+id); err != nil {
		return 0, err
	}
	if err := client.RemoveDevice(ctx, id); err != nil {
		return 0, err
	}
	return took, cmd.Wait()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
