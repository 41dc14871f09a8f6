// Package vmmtest is a VMM for tests of what drives one: it answers Cloud
// Hypervisor's calls with their real semantics, as far as shares go, and has no
// guest. test/standin is the one that has.
package vmmtest

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"spectrum-os.org/broker/vmm"
)

// fakeVMM connects to an added fs and speaks to it; a removed one is ejected
// later by the "guest", which closes the connection. One request is served at a
// time. The guest's manners are words in the VM's command line:
//
//	hold      never ejects
//	keep-a    never ejects the device of object a
//	slow-add  answers vm.add-fs after a second
//	no-boot   fails vm.boot
//
// and the test drives it with a line on [Socket]: reboot, shutdown, crash, which
// ends the VMM at once, crash-in-add, which does in the next vm.add-fs,
// hang-in-add, which never answers it, and "eject ID", which lets go of a device that nobody took away. "done" is the answer.
type fakeVMM struct {
	events *os.File
	mu     sync.Mutex
	config vmm.VMConfig
	fs     map[string]net.Conn
	next   string     // what the next vm.add-fs does: "", crash-in-add or hang-in-add
	turn   sync.Mutex // one request at a time
}

// Socket is where the test's words are taken, in the VMM's working directory.
const Socket = "fake.sock"

// Main is the VMM: a test binary runs it where it is called as one, and exits
// with what it returns.
func Main(args []string) int {
	f := &fakeVMM{fs: map[string]net.Conn{}}
	var socket string
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "--api-socket":
			socket = strings.TrimPrefix(args[i+1], "path=")
		case "--event-monitor":
			var fd int
			if _, err := fmt.Sscanf(args[i+1], "fd=%d", &fd); err != nil {
				return 2
			}
			f.events = os.NewFile(uintptr(fd), "events")
		}
	}
	_ = os.Remove(Socket)
	control, err := net.Listen("unix", Socket)
	if err != nil {
		return 3
	}
	go f.control(control)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return 3
	}
	_ = http.Serve(l, f) //nolint:gosec // a test's server
	return 4
}

func (f *fakeVMM) control(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		line, _ := bufio.NewReader(conn).ReadString('\n')
		word, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch word {
		case "reboot":
			f.event("rebooting")
		case "shutdown":
			os.Exit(0)
		case "crash":
			fmt.Fprintln(os.Stderr, "something broke")
			os.Exit(7)
		case "crash-in-add", "hang-in-add":
			f.mu.Lock()
			f.next = word
			f.mu.Unlock()
		case "eject":
			f.eject(id)
		}
		_, _ = io.WriteString(conn, "done\n")
		_ = conn.Close()
	}
}

// serial is a guest that greets and then echoes.
func (f *fakeVMM) serial() error {
	l, err := net.Listen("unix", f.config.Serial.Socket)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "login: ")
			if f.guest("chatty") {
				line := strings.Repeat("x", 1023) + "\n"
				for range 3 << 10 {
					_, _ = io.WriteString(conn, line)
				}
			}
			_, _ = io.Copy(conn, conn)
		}
	}()
	return nil
}

func (f *fakeVMM) event(name string) {
	b, _ := vmm.Event{EventName: vmm.EventName{Source: "vm", Event: name}}.MarshalText()
	_, _ = f.events.Write(append(b, "\n\n"...))
}

func (f *fakeVMM) guest(word string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Contains(f.config.Payload.Cmdline, word)
}

func (f *fakeVMM) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.turn.Lock()
	defer f.turn.Unlock()
	switch strings.TrimPrefix(r.URL.Path, "/api/v1/") {
	case "vmm.ping":
		_ = json.NewEncoder(w).Encode(map[string]string{"version": "fake"})
	case "vm.create":
		f.mu.Lock()
		defer f.mu.Unlock()
		if err := json.NewDecoder(r.Body).Decode(&f.config); err != nil {
			fail(w, 400, err.Error())
			return
		}
		w.WriteHeader(http.StatusNoContent)
	case "vm.boot":
		// The kernel is readable by its descriptor's name, at every start.
		if _, err := os.ReadFile(f.config.Payload.Kernel); err != nil || f.guest("no-boot") {
			fail(w, 500, "Cannot load kernel")
			return
		}
		if err := f.serial(); err != nil {
			fail(w, 500, err.Error())
			return
		}
		f.event("booted")
		w.WriteHeader(http.StatusNoContent)
	case "vm.add-fs":
		f.addFS(w, r)
	case "vm.remove-device":
		f.removeDevice(w, r)
	case "vm.info":
		tree := map[string]any{}
		f.mu.Lock()
		for id := range f.fs {
			tree[id] = map[string]string{"id": id}
		}
		f.mu.Unlock()
		_ = json.NewEncoder(w).Encode(map[string]any{"config": map[string]any{}, "state": "Running", "device_tree": tree})
	case "vm.power-button":
		w.WriteHeader(http.StatusNoContent)
		if !f.guest("hold") {
			time.AfterFunc(20*time.Millisecond, func() { os.Exit(0) })
		}
	default:
		fail(w, 404, "unknown")
	}
}

func fail(w http.ResponseWriter, status int, message string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode([]string{message})
}

func (f *fakeVMM) addFS(w http.ResponseWriter, r *http.Request) {
	var c vmm.FSConfig
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		fail(w, 400, err.Error())
		return
	}
	if f.guest("slow-add") {
		time.Sleep(time.Second)
	}
	conn, err := net.Dial("unix", c.Socket)
	if err == nil {
		err = vhostFeatures(conn)
	}
	if err != nil {
		fail(w, 500, "vhost-user: "+err.Error())
		return
	}
	f.mu.Lock()
	switch f.next {
	case "crash-in-add":
		os.Exit(7)
	case "hang-in-add":
		f.mu.Unlock()
		select {}
	}
	f.fs[c.ID] = conn
	f.mu.Unlock()
	_ = json.NewEncoder(w).Encode(map[string]string{"id": c.ID, "bdf": "0000:00:05.0"})
	go func() { // the connection's end is the device's, as when a guest ejects
		_, _ = io.Copy(io.Discard, conn)
	}()
}

// vhostFeatures makes one vhost-user round trip: VHOST_USER_GET_FEATURES.
func vhostFeatures(conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	msg := binary.LittleEndian.AppendUint32(nil, 1)
	msg = binary.LittleEndian.AppendUint32(msg, 1) // version 1
	msg = binary.LittleEndian.AppendUint32(msg, 0)
	if _, err := conn.Write(msg); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 12+8))
	_ = conn.SetDeadline(time.Time{})
	return err
}

func (f *fakeVMM) removeDevice(w http.ResponseWriter, r *http.Request) {
	var c struct{ ID string }
	_ = json.NewDecoder(r.Body).Decode(&c)
	f.mu.Lock()
	conn := f.fs[c.ID]
	f.mu.Unlock()
	if conn == nil {
		fail(w, 404, "no such device")
		return
	}
	w.WriteHeader(http.StatusNoContent)
	if f.guest("hold") || f.guest("keep-a") && c.ID == "fs-a" {
		return
	}
	time.AfterFunc(30*time.Millisecond, func() { f.eject(c.ID) })
}

func (f *fakeVMM) eject(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if conn := f.fs[id]; conn != nil {
		_ = conn.Close()
	}
	delete(f.fs, id)
}
