package main

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseArgs(t *testing.T) {
	none := endpoint{fd: -1}
	path := func(p string) endpoint { return endpoint{path: p, fd: -1} }
	tests := []struct {
		line string
		want options
	}{
		{"--api-socket path=/a/b", options{api: path("/a/b"), events: none}},
		{"--api-socket=path=/a/b", options{api: path("/a/b"), events: none}},
		{"--api-socket /a/b", options{api: path("/a/b"), events: none}},
		{"--api-socket fd=7 --event-monitor path=/e", options{api: endpoint{fd: 7}, events: path("/e")}},
		{"--event-monitor fd=3 --api-socket path=/a", options{api: path("/a"), events: endpoint{fd: 3}}},
		{"--api-socket path=/a -vv -v", options{api: path("/a"), events: none, verbosity: 3}},
		{
			"--api-socket path=/a --log-file /l --seccomp false --landlock --no-shutdown",
			options{api: path("/a"), events: none, logFile: "/l", noShutdown: true},
		},
		{"--version", options{api: none, events: none, showVer: true}},
		{"-h", options{api: none, events: none, showHelp: true}},
	}
	for _, tt := range tests {
		got, err := parseArgs(strings.Fields(tt.line))
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %+v, %v; want %+v", tt.line, got, err, tt.want)
		}
	}
}

func TestParseArgsRefuses(t *testing.T) {
	for line, reason := range map[string]string{
		"":                   "--api-socket is required",
		"--api-socket":       "a value is required",
		"--api-socket path=": "path or fd required",
		"--api-socket fd=x":  "invalid descriptor",
		"--api-socket fd=-1": "invalid descriptor",
		"--api-socket path=/a --event-monitor /e": "path or fd required",
		"--api-socket path=/a --kernel /k":        "unexpected argument '--kernel'",
		"--api-socket path=/a stray":              "unexpected argument 'stray'",
		"--api-socket path=/a -vx":                "unexpected argument '-vx'",
	} {
		if _, err := parseArgs(strings.Fields(line)); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: %v; want %q", line, err, reason)
		}
	}
}
