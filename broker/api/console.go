package api

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// ConsoleProtocol is the name that GET /v1/vms/{ref}/console upgrades to: the
// bytes of the VM's serial console, both ways, with no framing.
const ConsoleProtocol = "spectrum-console"

func (h *HostHandler) console(x *exchange) (reply, error) {
	if !wantsUpgrade(x.r, ConsoleProtocol) {
		return reply{}, Errorf(CodeInvalid, "a console needs Connection: Upgrade and Upgrade: %s", ConsoleProtocol)
	}
	conn, err := h.svc.Console(x.r.Context(), x.caller, x.params["ref"])
	if err != nil {
		return reply{}, err
	}
	return reply{upgrade: conn}, nil
}

func wantsUpgrade(r *http.Request, protocol string) bool {
	for part := range strings.SplitSeq(r.Header.Get("Connection"), ",") {
		if strings.EqualFold(strings.TrimSpace(part), "upgrade") {
			return strings.EqualFold(r.Header.Get("Upgrade"), protocol)
		}
	}
	return false
}

// join takes over the client's connection and copies between it and inner
// until either end closes or the server stops.
func (d *door) join(x *exchange, inner net.Conn) {
	defer func() { _ = inner.Close() }()
	outer, buffered, err := http.NewResponseController(x.w).Hijack()
	if err != nil {
		d.fail(x.w, x.r, nil, err)
		return
	}
	defer func() { _ = outer.Close() }()
	_ = outer.SetDeadline(time.Now().Add(d.writeTimeout))
	if _, err := fmt.Fprintf(outer, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", ConsoleProtocol); err != nil {
		return
	}
	_ = outer.SetDeadline(time.Time{})
	ctx, cancel := untilStopping(x.r.Context())
	defer cancel()
	done := make(chan struct{}, 2)
	go func() {
		_, _ = io.Copy(inner, buffered.Reader) // holds what came with the request
		done <- struct{}{}
	}()
	go func() {
		_, _ = io.Copy(outer, inner)
		done <- struct{}{}
	}()
	ended := 0
	select {
	case <-done:
		ended++
	case <-ctx.Done():
	}
	_ = inner.Close()
	_ = outer.Close()
	for ; ended < 2; ended++ {
		<-done
	}
}
