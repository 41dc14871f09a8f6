package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"spectrum-os.org/broker/vmm/chapi"
)

// The generated types under the names that callers use. Their zero values are
// left out of requests, so that Cloud Hypervisor's defaults apply.
type (
	VMConfig       = chapi.VMConfig
	PayloadConfig  = chapi.PayloadConfig
	CPUsConfig     = chapi.CPUsConfig
	MemoryConfig   = chapi.MemoryConfig
	PlatformConfig = chapi.PlatformConfig
	DiskConfig     = chapi.DiskConfig
	NetConfig      = chapi.NetConfig
	FSConfig       = chapi.FSConfig
	VsockConfig    = chapi.VsockConfig
	ConsoleConfig  = chapi.ConsoleConfig
	RNGConfig      = chapi.RNGConfig
	LandlockRule   = chapi.LandlockRule
	RestoreConfig  = chapi.RestoreConfig
	DeviceNode     = chapi.DeviceNode
	DeviceInfo     = chapi.PCIDeviceInfo
	Info           = chapi.VMInfo
	State          = chapi.VMState
	PingInfo       = chapi.Ping
)

// States of a VM, as [Client.Info] gives them.
const (
	StateCreated  = chapi.Created
	StateRunning  = chapi.Running
	StatePaused   = chapi.Paused
	StateShutdown = chapi.Shutdown
)

// Modes of a console or a serial port.
const (
	ConsoleOff    = chapi.Off
	ConsoleNull   = chapi.Null
	ConsoleFile   = chapi.File
	ConsoleSocket = chapi.Socket
	ConsolePty    = chapi.Pty
	ConsoleTty    = chapi.Tty
)

// RestoreCopy is the only way to read a snapshot's memory back that is safe
// with vhost-user devices: on-demand paging shows virtiofsd zeros for pages
// that were not faulted in yet.
const RestoreCopy = chapi.Copy

// ImageRaw keeps the VMM from guessing an image's format from its first bytes,
// which a guest may have written.
const ImageRaw = chapi.Raw

// maxAnswer bounds what is read of one answer. The largest, vm.info of a VM
// with hundreds of devices, is well under 1 MiB.
const maxAnswer = 4 << 20

// Client speaks to the one VMM behind a socket. Its methods may be called from
// several goroutines; calls are sent one at a time.
type Client struct {
	socket string
	turn   chan struct{}
	api    *chapi.Client
}

// NewClient returns a client of the VMM that listens, or will listen, on the
// UNIX socket. Nothing is dialled until the first call.
func NewClient(socket string) *Client {
	c := &Client{socket: socket, turn: make(chan struct{}, 1)}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		// A connection per call: an idle one would occupy one of the VMM's
		// ten, and could turn out to be that of a VMM that is gone.
		DisableKeepAlives:  true,
		DisableCompression: true,
	}
	api, err := chapi.NewClient("http://localhost/api/v1/",
		chapi.WithHTTPClient(&http.Client{Transport: transport}))
	if err != nil {
		panic("vmm: " + err.Error()) // only a malformed constant URL gets here
	}
	c.api = api
	return c
}

// Socket is the path that the client dials.
func (c *Client) Socket() string { return c.socket }

// Ping asks which VMM answers.
func (c *Client) Ping(ctx context.Context) (PingInfo, error) {
	var out PingInfo
	_, err := c.call(ctx, "vmm.ping", &out, func() (*http.Response, error) { return c.api.PingVMM(ctx) })
	return out, err
}

// Create hands over the VM's configuration. Nothing runs until [Client.Boot].
func (c *Client) Create(ctx context.Context, config VMConfig) error {
	_, err := c.call(ctx, "vm.create", nil, func() (*http.Response, error) { return c.api.CreateVM(ctx, config) })
	return err
}

// Boot starts the guest.
func (c *Client) Boot(ctx context.Context) error {
	_, err := c.call(ctx, "vm.boot", nil, func() (*http.Response, error) { return c.api.BootVM(ctx) })
	return err
}

// Delete ends the VM, if there is one, and forgets its configuration.
func (c *Client) Delete(ctx context.Context) error {
	_, err := c.call(ctx, "vm.delete", nil, func() (*http.Response, error) { return c.api.DeleteVM(ctx) })
	return err
}

// Info reports the configuration, the state and the device tree, whose keys
// are the ids of the devices that exist now.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var out Info
	_, err := c.call(ctx, "vm.info", &out, func() (*http.Response, error) { return c.api.InfoVM(ctx) })
	return out, err
}

// Pause stops the guest's processors.
func (c *Client) Pause(ctx context.Context) error {
	_, err := c.call(ctx, "vm.pause", nil, func() (*http.Response, error) { return c.api.PauseVM(ctx) })
	return err
}

// Resume lets a paused guest run on.
func (c *Client) Resume(ctx context.Context) error {
	_, err := c.call(ctx, "vm.resume", nil, func() (*http.Response, error) { return c.api.ResumeVM(ctx) })
	return err
}

// PowerButton asks the guest to shut down; the VMM exits when it has.
func (c *Client) PowerButton(ctx context.Context) error {
	_, err := c.call(ctx, "vm.power-button", nil, func() (*http.Response, error) { return c.api.PressPowerButton(ctx) })
	return err
}

// Shutdown ends the guest without asking it. The VMM stays.
func (c *Client) Shutdown(ctx context.Context) error {
	_, err := c.call(ctx, "vm.shutdown", nil, func() (*http.Response, error) { return c.api.ShutdownVM(ctx) })
	return err
}

// Reboot ends the guest without asking it and boots it again.
func (c *Client) Reboot(ctx context.Context) error {
	_, err := c.call(ctx, "vm.reboot", nil, func() (*http.Response, error) { return c.api.RebootVM(ctx) })
	return err
}

// VMMShutdown ends the guest and the VMM.
func (c *Client) VMMShutdown(ctx context.Context) error {
	_, err := c.call(ctx, "vmm.shutdown", nil, func() (*http.Response, error) { return c.api.ShutdownVMM(ctx) })
	return err
}

// AddFS attaches a vhost-user file system and returns where on the guest's
// buses it is, as "ssss:bb:dd.f", or "" for a VM that does not run yet. The
// socket must already be listening (see the package's laws).
func (c *Client) AddFS(ctx context.Context, fs FSConfig) (bdf string, err error) {
	var out DeviceInfo
	_, err = c.call(ctx, "vm.add-fs", &out, func() (*http.Response, error) { return c.api.AddFS(ctx, fs) })
	return out.BDF, err
}

// AddDisk attaches a disk; see [Client.AddFS] for what it returns.
func (c *Client) AddDisk(ctx context.Context, disk DiskConfig) (bdf string, err error) {
	var out DeviceInfo
	_, err = c.call(ctx, "vm.add-disk", &out, func() (*http.Response, error) { return c.api.AddDisk(ctx, disk) })
	return out.BDF, err
}

// AddNet attaches a NIC; see [Client.AddFS] for what it returns.
func (c *Client) AddNet(ctx context.Context, nic NetConfig) (bdf string, err error) {
	var out DeviceInfo
	_, err = c.call(ctx, "vm.add-net", &out, func() (*http.Response, error) { return c.api.AddNet(ctx, nic) })
	return out.BDF, err
}

// RemoveDevice tells the guest to let go of a device. It returns before the
// device is gone.
func (c *Client) RemoveDevice(ctx context.Context, id string) error {
	_, err := c.call(ctx, "vm.remove-device", nil, func() (*http.Response, error) {
		return c.api.RemoveDevice(ctx, chapi.RemoveDevice{ID: id})
	})
	return err
}

// Snapshot writes a paused VM into the directory, which must exist and be
// empty: config.json, state.json and memory-ranges.
func (c *Client) Snapshot(ctx context.Context, dir string) error {
	_, err := c.call(ctx, "vm.snapshot", nil, func() (*http.Response, error) {
		return c.api.SnapshotVM(ctx, chapi.SnapshotConfig{DestinationURL: "file://" + dir})
	})
	return err
}

// Restore makes a VM of the snapshot in the directory. It is paused unless
// resume is true. Memory is always copied; see [RestoreCopy].
func (c *Client) Restore(ctx context.Context, dir string, resume bool) error {
	_, err := c.call(ctx, "vm.restore", nil, func() (*http.Response, error) {
		return c.api.RestoreVM(ctx, RestoreConfig{
			SourceURL: "file://" + dir, MemoryRestoreMode: RestoreCopy, Resume: resume,
		})
	})
	return err
}

// call waits for its turn, sends, and reads the answer into out unless the
// answer has no body. It returns the HTTP status.
func (c *Client) call(ctx context.Context, op string, out any, send func() (*http.Response, error)) (int, error) {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, fmt.Errorf("cannot call %s: waiting for an earlier call: %w", op, context.Cause(ctx))
	}
	defer func() { <-c.turn }()

	resp, err := send()
	if err != nil {
		return 0, fmt.Errorf("cannot call %s: %w", op, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return resp.StatusCode, fmt.Errorf("cannot read the answer to %s: %w", op, err)
	}
	if len(body) > maxAnswer {
		return resp.StatusCode, fmt.Errorf("cannot read the answer to %s: longer than %d bytes", op, maxAnswer)
	}
	switch resp.StatusCode {
	case http.StatusNoContent:
		return resp.StatusCode, nil
	case http.StatusOK:
		if out == nil {
			return resp.StatusCode, nil
		}
		if err := json.Unmarshal(body, out); err != nil {
			return resp.StatusCode, fmt.Errorf("cannot parse the answer to %s: %w", op, err)
		}
		return resp.StatusCode, nil
	}
	return resp.StatusCode, &Error{Op: op, Status: resp.StatusCode, Messages: messages(body)}
}

// messages reads an error answer: a JSON array of strings, or, from older
// versions, plain text.
func messages(body []byte) []string {
	var list []string
	if json.Unmarshal(body, &list) == nil {
		return list
	}
	if text := strings.TrimSpace(string(body)); text != "" {
		if len(text) > 1024 {
			text = text[:1024]
		}
		return []string{text}
	}
	return nil
}

// What an [Error] can be matched against with errors.Is.
var (
	// ErrNotFound: there is no such device, or no VM was created.
	ErrNotFound = errors.New("the VMM knows no such thing")
	// ErrExists: the identifier is taken.
	ErrExists = errors.New("the identifier is taken")
	// ErrNoSlot: the PCI segment is full.
	ErrNoSlot = errors.New("the PCI segment has no free slot")
)

// noSlot is the message by which Cloud Hypervisor names a full segment; the
// status alone, 500, says nothing.
const noSlot = "Could not find an available device slot on the PCI bus"

// Error is what a VMM answered instead of doing what it was told.
type Error struct {
	Op       string   // the call, as "vm.add-fs"
	Status   int      // the HTTP status: 400, 404, 409, 500
	Messages []string // outermost cause first; may be empty
}

func (e *Error) Error() string {
	if len(e.Messages) == 0 {
		return fmt.Sprintf("%s failed: status %d", e.Op, e.Status)
	}
	return fmt.Sprintf("%s failed: %s", e.Op, strings.Join(e.Messages, ": "))
}

// Is matches the sentinels of this package.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrNotFound:
		return e.Status == http.StatusNotFound
	case ErrExists:
		return e.Status == http.StatusConflict
	case ErrNoSlot:
		for _, m := range e.Messages {
			if strings.Contains(m, noSlot) {
				return true
			}
		}
	}
	return false
}
