package main

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/vmm"
)

// newTestMachine has no QEMU: a VM that is booted fails to.
func newTestMachine(t *testing.T) *machine {
	t.Helper()
	h := &host{
		spawn: newSpawner(), events: &monitor{start: time.Now()}, stderr: os.Stderr,
		qemu: "/nonexistent/qemu", vsock: "/nonexistent/vsock",
		log: slog.New(slog.DiscardHandler), fsWait: 50 * time.Millisecond, stopping: make(chan struct{}),
	}
	return newMachine(h, false)
}

func request(m *machine, method, call, body string) (int, string) {
	r := httptest.NewRequest(method, "/api/v1/"+call, strings.NewReader(body))
	w := httptest.NewRecorder()
	m.handler().ServeHTTP(w, r)
	text, _ := io.ReadAll(w.Body)
	return w.Code, string(text)
}

const fsBody = `{"id":"one","tag":"t","socket":"/s","num_queues":1,"queue_size":1024}`

// TestAnswers checks statuses and causes against what Cloud Hypervisor
// answers. Each row builds on the ones before.
func TestAnswers(t *testing.T) {
	m := newTestMachine(t)
	for _, row := range []struct {
		method, call, body string
		status             int
		want               string // the whole answer, or its start and end around …
	}{
		{"GET", "bogus", "", 404, `["Not Found"]`},
		{"GET", "vm.boot", "", 400, `["Bad Request"]`},
		{"POST", "vm.create", "{}", 400, `["Bad Request"]`},
		{"PUT", "vm.boot", "{}", 400, `["Bad Request"]`},
		{"PUT", "vm.create", "", 400, `["Bad Request"]`},
		{"PUT", "vm.create", "{", 400, `["Failed to deserialize JSON","…"]`},
		{"PUT", "vm.create", "{}", 400, "[\"Failed to deserialize JSON\",\"missing field `payload`\"]"},
		{"GET", "vm.info", "", 404, `["Error from API","The VM info is not available","VM is not created"]`},
		{"PUT", "vm.boot", "", 404, `["Error from API","The VM could not boot","VM config is missing"]`},
		{"PUT", "vm.pause", "", 500, `["Error from API","The VM could not be paused","VM is not running"]`},
		{"PUT", "vm.add-fs", fsBody, 404, `["Error from API","The fs could not be added to the VM","VM is not created"]`},
		{
			"PUT", "vm.create", `{"payload":{"kernel":"/k"},"platform":{"num_pci_segments":99}}`, 400,
			`["Error from API","The VM could not be created","Failed to validate config","…"]`,
		},
		{
			"PUT", "vm.create", `{"payload":{"kernel":"/k"},"memory":{"size":1048576,"shared":true},"unknown":1}`, 204, "",
		},
		{"PUT", "vm.create", `{"payload":{"kernel":"/k"}}`, 500, `["Error from API","The VM could not be created","VM is already created"]`},
		{"GET", "vm.info", "", 200, `{"config":…"state":"Created"}`},
		{"PUT", "vm.add-fs", `{"id":"one"}`, 400, "[\"Failed to deserialize JSON\",\"missing field `tag`\"]"},
		{"PUT", "vm.add-fs", fsBody, 204, ""},
		{"PUT", "vm.add-fs", fsBody, 409, `["Error from API","The fs could not be added to the VM","Failed to validate config","Identifier one is not unique"]`},
		{
			"PUT", "vm.add-fs", `{"id":"two","tag":"t","socket":"/s","pci_segment":1}`, 400,
			`["Error from API","The fs could not be added to the VM","Failed to validate config","Invalid PCI segment id: 1"]`,
		},
		{"PUT", "vm.remove-device", `{"id":"one"}`, 204, ""},
		{"PUT", "vm.remove-device", `{"id":"one"}`, 404, `["Error from API","The device could not be removed from the VM","No device with id \"one\" to remove"]`},
		{"PUT", "vm.boot", "", 500, `["Error from API","The VM could not boot","Cannot open kernel file","…"]`},
		{"PUT", "vm.delete", "", 204, ""},
		{"GET", "vm.info", "", 404, `["Error from API","The VM info is not available","VM is not created"]`},
		{"PUT", "vm.restore", `{"source_url":"relative"}`, 500, `["Error from API","The VM could not be restored","Invalid restore source URL"]`},
		{"PUT", "vmm.shutdown", "", 204, ""},
	} {
		status, body := request(m, row.method, row.call, row.body)
		start, end, _ := strings.Cut(row.want, "…")
		if status != row.status || !strings.HasPrefix(body, start) || !strings.HasSuffix(body, end) ||
			(body != row.want && !strings.Contains(row.want, "…")) {
			t.Errorf("%s %s %s: %d %s; want %d %s", row.method, row.call, row.body, status, body, row.status, row.want)
		}
	}
	if code := <-m.exit; code != 0 {
		t.Errorf("vmm.shutdown exits with %d", code)
	}
}

// TestErrorsAreLists: whoever reads an error gets an array of strings.
func TestErrorsAreLists(t *testing.T) {
	m := newTestMachine(t)
	for call, rt := range routes {
		body := ""
		if rt.body {
			body = "{}"
		}
		if call == "vmm.ping" || call == "vmm.shutdown" || call == "vm.delete" {
			continue // these succeed without a VM
		}
		status, text := request(m, rt.method, call, body)
		var chain []string
		if err := json.Unmarshal([]byte(text), &chain); err != nil || len(chain) < 2 || status < 400 {
			t.Errorf("%s: %d %s", call, status, text)
		}
	}
}

func TestAbsentListenerBlocksEveryCall(t *testing.T) {
	m := newTestMachine(t)
	m.host.fsWait = 300 * time.Millisecond
	g := &guest{host: m.host, devices: newDevices(1)}
	m.config = &vmm.VMConfig{Memory: vmm.MemoryConfig{Shared: true}}
	m.guest, m.state = g, vmm.StateRunning
	socket := filepath.Join(t.TempDir(), "nobody")
	done := make(chan string)
	go func() {
		_, body := request(m, "PUT", "vm.add-fs", `{"id":"x","tag":"x","socket":"`+socket+`"}`)
		done <- body
	}()
	time.Sleep(50 * time.Millisecond)
	start := time.Now()
	if status, _ := request(m, "GET", "vmm.ping", ""); status != http.StatusOK {
		t.Errorf("ping: %d", status)
	}
	if waited := time.Since(start); waited < 200*time.Millisecond {
		t.Errorf("a second call was served after %v, beside the first", waited)
	}
	if body := <-done; !strings.Contains(body, "Timed out waiting for vhost-user connection") {
		t.Errorf("vm.add-fs: %s", body)
	}
	if len(m.config.FS) != 0 {
		t.Error("the configuration lists a device that was not added")
	}
}

func TestDevices(t *testing.T) {
	tree := newDevices(2)
	if _, err := tree.add("__rng", "rng", 0); err != nil {
		t.Fatal(err)
	}
	var first *device
	for i := range slotsPerSegment {
		d, err := tree.add("fs"+string(rune('A'+i)), "fs", 1)
		if err != nil {
			t.Fatalf("device %d: %v", i, err)
		}
		if first == nil {
			first = d
		}
	}
	if first.bdf() != "0001:00:01.0" {
		t.Errorf("the first device is at %s", first.bdf())
	}
	_, err := tree.add("more", "fs", 1)
	if err == nil || !strings.HasSuffix(err.Error(), "Could not find an available device slot on the PCI bus") {
		t.Errorf("a full segment says %v", err)
	}
	if _, err := tree.add("__rng", "rng", 1); err == nil {
		t.Error("an id was taken twice")
	}
	if _, err := tree.add("elsewhere", "fs", 0); err != nil {
		t.Errorf("a full segment stops another: %v", err)
	}
	tree.drop(first)
	again, err := tree.add("again", "fs", 1)
	if err != nil || again.slot != first.slot || again.qid == first.qid {
		t.Errorf("a freed slot was not used again: %+v, %v", again, err)
	}
	nodes := tree.tree()
	if n := nodes["_virtio-pci-again"]; n.PCIBDF != "0001:00:01.0" || !slices.Equal(n.Children, []string{"again"}) {
		t.Errorf("PCI node %+v", n)
	}
	if nodes["again"].Parent != "_virtio-pci-again" {
		t.Errorf("device node %+v", nodes["again"])
	}
}

func TestMonitorIsReadByTheClient(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	m, err := openMonitor(endpoint{path: path, fd: -1})
	if err != nil {
		t.Fatal(err)
	}
	m.say("vm", "booting")
	m.say("vm", "device-removed", "id", "one", "bdf", "0000:00:01.0")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	events := vmm.NewEvents(f)
	if e, err := events.Next(); err != nil || e.EventName != (vmm.EventName{Source: "vm", Event: "booting"}) || e.Properties != nil {
		t.Errorf("%+v, %v", e, err)
	}
	if e, err := events.Next(); err != nil || e.EventName != vmm.EventRemoved || e.Properties["id"] != "one" {
		t.Errorf("%+v, %v", e, err)
	}
	if _, err := events.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}
