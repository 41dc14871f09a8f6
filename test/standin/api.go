package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"spectrum-os.org/broker/vmm"
	"spectrum-os.org/broker/vmm/chapi"
)

// maxBody is the largest request that is read, as Cloud Hypervisor's server has it.
const maxBody = 4 << 20

// route is one call: its method, what its failure is called, and what it does
// with the body. A nil body means that none may be sent; a nil answer is 204.
type route struct {
	method  string
	failure string
	body    bool
	serve   func(m *machine, body []byte) (any, error)
}

// routes is every call the stand-in serves. The failure texts are Cloud
// Hypervisor's.
var routes = map[string]route{
	"vmm.ping": {"GET", "The VMM could not be pinged", false, func(m *machine, _ []byte) (any, error) {
		return m.ping(), nil
	}},
	"vmm.shutdown": {"PUT", "The VMM could not shutdown", false, func(m *machine, _ []byte) (any, error) {
		m.shutdownVMM()
		return nil, nil
	}},
	"vm.create": {"PUT", "The VM could not be created", true, func(m *machine, body []byte) (any, error) {
		var cfg vmm.VMConfig
		if err := decode(body, &cfg, "payload"); err != nil {
			return nil, err
		}
		return nil, m.create(cfg)
	}},
	"vm.delete":       plain("The VM could not be deleted", (*machine).delete),
	"vm.boot":         plain("The VM could not boot", (*machine).boot),
	"vm.pause":        plain("The VM could not be paused", (*machine).pause),
	"vm.resume":       plain("The VM could not resume", (*machine).resume),
	"vm.shutdown":     plain("The VM could not shutdown", (*machine).shutdown),
	"vm.reboot":       plain("The VM could not reboot", (*machine).reboot),
	"vm.power-button": plain("Error triggering power button", (*machine).powerButton),
	"vm.info": {"GET", "The VM info is not available", false, func(m *machine, _ []byte) (any, error) {
		return m.info()
	}},
	"vm.add-fs": {"PUT", "The fs could not be added to the VM", true, func(m *machine, body []byte) (any, error) {
		fs := vmm.FSConfig{NumQueues: 1, QueueSize: 1024}
		if err := decode(body, &fs, "tag", "socket"); err != nil {
			return nil, err
		}
		info, err := m.addFS(fs)
		if info == nil {
			return nil, err
		}
		return info, err
	}},
	"vm.remove-device": {"PUT", "The device could not be removed from the VM", true, func(m *machine, body []byte) (any, error) {
		var device chapi.RemoveDevice
		if err := decode(body, &device, "id"); err != nil {
			return nil, err
		}
		return nil, m.removeDevice(device.ID)
	}},
	"vm.snapshot": {"PUT", "The VM could not be snapshotted", true, func(m *machine, body []byte) (any, error) {
		var cfg chapi.SnapshotConfig
		if err := decode(body, &cfg, "destination_url"); err != nil {
			return nil, err
		}
		return nil, m.snapshot(cfg.DestinationURL)
	}},
	"vm.restore": {"PUT", "The VM could not be restored", true, func(m *machine, body []byte) (any, error) {
		var cfg vmm.RestoreConfig
		if err := decode(body, &cfg, "source_url"); err != nil {
			return nil, err
		}
		return nil, m.restore(cfg)
	}},
}

func plain(failure string, serve func(*machine) error) route {
	return route{"PUT", failure, false, func(m *machine, _ []byte) (any, error) { return nil, serve(m) }}
}

// badRequest marks a failure that the HTTP layer gives, before any call: it has
// no "Error from API" in front.
type badRequest struct{ error }

// decode reads a JSON object that must have the named fields. Other fields
// that are unknown are ignored, as Cloud Hypervisor ignores them.
func decode(body []byte, out any, required ...string) error {
	var fields map[string]json.RawMessage
	err := json.Unmarshal(body, &fields)
	if err == nil {
		err = json.Unmarshal(body, out)
	}
	if err != nil {
		return badRequest{fail(http.StatusBadRequest, "Failed to deserialize JSON", err.Error())}
	}
	for _, name := range required {
		if _, ok := fields[name]; !ok {
			return badRequest{fail(http.StatusBadRequest, "Failed to deserialize JSON", "missing field `"+name+"`")}
		}
	}
	return nil
}

// handler serves the API, one call at a time.
func (m *machine) handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		const root = "/api/v1/"
		path := r.URL.Path
		rt, known := route{}, false
		if len(path) > len(root) && path[:len(root)] == root {
			rt, known = routes[path[len(root):]]
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
		switch {
		case !known:
			answer(w, nil, fail(http.StatusNotFound, "Not Found"))
		case r.Method != rt.method, err != nil, len(body) > maxBody, rt.body == (len(bytes.TrimSpace(body)) == 0):
			answer(w, nil, fail(http.StatusBadRequest, "Bad Request"))
		default:
			result, err := m.call(rt, body)
			answer(w, result, err)
		}
	})
}

func (m *machine) call(rt route, body []byte) (any, error) {
	m.turn.Lock()
	defer m.turn.Unlock()
	result, err := rt.serve(m, body)
	if bad := (badRequest{}); errors.As(err, &bad) {
		return nil, bad.error
	}
	return result, within(err, "Error from API", rt.failure)
}

func answer(w http.ResponseWriter, result any, err error) {
	status := http.StatusOK
	if err != nil {
		var f *failure
		if !errors.As(err, &f) {
			f = &failure{http.StatusInternalServerError, []string{err.Error()}}
		}
		status, result = f.status, f.chain
	}
	if result == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	text, err := json.Marshal(result)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(text)
}
