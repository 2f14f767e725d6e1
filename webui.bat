@echo off
rem Start the service with the flags of AUTOMATIC1111 and Forge; see launch.py.
cd /d "%~dp0"
if not defined PYTHON set PYTHON=python
"%PYTHON%" launch.py %*
