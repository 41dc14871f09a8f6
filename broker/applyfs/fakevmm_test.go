package applyfs

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

// fakeVMM answers the calls that a shim makes of Cloud Hypervisor with their
// real semantics, as far as shares go: an added one is connected to and spoken
// to; a removed one is ejected later, by the "guest", which closes the
// connection, so that virtiofsd ends by itself. One request is served at a time.
//
// A test drives the guest with words on [fakeVMMSock]: "reboot", "crash", which
// ends the VMM at once, "crash-in-add", which does in the next vm.add-fs, and
// "eject ID", which lets go of a device that nobody took away.
type fakeVMM struct {
	events *os.File
	config vmm.VMConfig
	turn   sync.Mutex // one request at a time

	mu         sync.Mutex
	fs         map[string]net.Conn
	crashInAdd bool
}

const fakeVMMSock = "guest.sock"

func fakeVMMMain(args []string) int {
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
	_ = os.Remove(fakeVMMSock)
	words, err := net.Listen("unix", fakeVMMSock)
	if err != nil {
		return 3
	}
	go f.listen(words)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return 3
	}
	_ = http.Serve(l, f)
	return 4
}

func (f *fakeVMM) listen(l net.Listener) {
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
		case "crash":
			os.Exit(7)
		case "crash-in-add":
			f.mu.Lock()
			f.crashInAdd = true
			f.mu.Unlock()
		case "eject":
			f.eject(id)
		}
		_, _ = io.WriteString(conn, "done\n")
		_ = conn.Close()
	}
}

func (f *fakeVMM) eject(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if conn := f.fs[id]; conn != nil {
		_ = conn.Close()
	}
	delete(f.fs, id)
}

func (f *fakeVMM) event(name string) {
	b, _ := vmm.Event{EventName: vmm.EventName{Source: "vm", Event: name}}.MarshalText()
	_, _ = f.events.Write(append(b, "\n\n"...))
}

func (f *fakeVMM) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.turn.Lock()
	defer f.turn.Unlock()
	switch strings.TrimPrefix(r.URL.Path, "/api/v1/") {
	case "vmm.ping":
		_ = json.NewEncoder(w).Encode(map[string]string{"version": "fake"})
	case "vm.create":
		if err := json.NewDecoder(r.Body).Decode(&f.config); err != nil {
			fail(w, http.StatusBadRequest, err.Error())
			return
		}
		w.WriteHeader(http.StatusNoContent)
	case "vm.boot":
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
		time.AfterFunc(10*time.Millisecond, func() { os.Exit(0) })
	default:
		fail(w, http.StatusNotFound, "unknown")
	}
}

func fail(w http.ResponseWriter, status int, message string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode([]string{message})
}

func (f *fakeVMM) addFS(w http.ResponseWriter, r *http.Request) {
	var c vmm.FSConfig
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	conn, err := net.Dial("unix", c.Socket)
	if err == nil {
		err = vhostFeatures(conn)
	}
	if err != nil {
		fail(w, http.StatusInternalServerError, "vhost-user: "+err.Error())
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.crashInAdd {
		os.Exit(7)
	}
	f.fs[c.ID] = conn
	_ = json.NewEncoder(w).Encode(map[string]string{"id": c.ID, "bdf": "0000:00:05.0"})
}

// vhostFeatures makes one vhost-user round trip: VHOST_USER_GET_FEATURES.
func vhostFeatures(conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	message := binary.LittleEndian.AppendUint32(nil, 1)
	message = binary.LittleEndian.AppendUint32(message, 1) // version 1
	message = binary.LittleEndian.AppendUint32(message, 0)
	if _, err := conn.Write(message); err != nil {
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
	known := f.fs[c.ID] != nil
	f.mu.Unlock()
	if !known {
		fail(w, http.StatusNotFound, "no such device")
		return
	}
	w.WriteHeader(http.StatusNoContent)
	time.AfterFunc(30*time.Millisecond, func() { f.eject(c.ID) })
}
